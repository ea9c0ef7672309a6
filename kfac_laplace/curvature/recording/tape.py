"""Records every use of the tracked parameters during one forward pass.

A `TorchFunctionMode` sees each functional call. Calls on parameters alone make new *sources*
(slices, transposes, looked-up tables, normalised weights). Where a source meets data, a layer rule
says what the call does with it, and the gradient edge of the output is taken at once, so that later
in-place operations do no harm. Afterwards a walk through the autograd graph that steps over the
recorded calls finds every parameter which reaches the output in any other way: no use passes
unnoticed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kfac_laplace.curvature.layers import (
    FORMS,
    GUARDS,
    OPERATORS,
    REPETITIONS,
    RULES,
    Layer,
)
from kfac_laplace.curvature.model.tensors import tensors_in
from kfac_laplace.curvature.recording.sources import Source, Sources
from kfac_laplace.errors import UnsupportedUse

Nudge = Callable[[int, Layer, Tensor], None]


@dataclass(frozen=True)
class Use:
    """One recorded call.

    Args:
        layer: what the call does.
        weight: the source of its weight, if that is tracked.
        bias: the source of its bias, if that is tracked.
        edge: gradient edge of its output.
        below: the graph nodes under it that are not its sources.
        call: its place among the recorded calls, those that the output does not depend on included.
    """

    layer: Layer
    weight: Source | None
    bias: Source | None
    edge: GradientEdge
    below: tuple[Node, ...]
    call: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources used."""
        return tuple(source for source in (self.weight, self.bias) if source is not None)

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the tracked parameters used, through whatever function of them."""
        return tuple(dict.fromkeys(name for source in self.sources for name in source.params))


@dataclass(frozen=True)
class Recording:
    """A forward pass: its output, its recorded uses, and the parameters used in other ways.

    Args:
        output: what the model returned.
        uses: recorded calls that the output depends on, in forward order.
        loose: names of the tracked parameters that reach the output outside recorded calls.
        picks_rows: whether rows were picked by values of the data.
        has_python_functions: whether derivatives written in Python are on the way back.
    """

    output: Tensor
    uses: tuple[Use, ...]
    loose: frozenset[str]
    picks_rows: bool
    has_python_functions: bool

    @cached_property
    def used_otherwise(self) -> frozenset[str]:
        """Names of the tracked parameters that reach the output in any way but as a layer's part.

        Layers are those with Kronecker factors; a parameter, or one of its equal parts, is theirs.
        """
        return self.loose.union(
            name
            for use in self.uses
            for source in use.sources
            if not use.layer.kronecker or source.own_part is None
            for name in source.params
        )


class Tape(TorchFunctionMode):
    """Collects the uses of tracked tensors while it is active.

    Args:
        tracked: parameter names and the tensors that the model will use for them.
        data: the model's inputs that differ between examples.
        n: number of examples.
        nudge: changes the output of a recorded call in place, if given; called with the call's
            place among them, its layer and its output.
        guarded: whether guards check the calls, which refuse what would leave an example without
            a Jacobian of its own. Training needs none.
    """

    def __init__(
        self,
        tracked: Mapping[str, Tensor],
        data: Iterable[Tensor],
        n: int,
        nudge: Nudge | None = None,
        guarded: bool = True,
    ):
        super().__init__()
        self._guards = GUARDS if guarded else {}
        self._nudge = nudge
        self._sources = Sources(tracked)
        self._names = {id(tensor): name for name, tensor in tracked.items()}
        self._data = WeakTensorKeyDictionary(dict.fromkeys(data, True))
        self._constants = WeakTensorKeyDictionary()  # functions of untracked parameters alone
        self._n = n
        self._picks_rows = False
        self.uses: list[Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, record it where sources meet data, and follow both through it."""
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if func in self._guards:
            self._guards[func](any(t in self._data for t in tensors), *args, **kwargs)
        made_of = [source for t in tensors if (source := self._sources.get(t)) is not None]
        # No graph comes of calls without gradients, as inside autograd functions: they are no uses.
        used = made_of if torch.is_grad_enabled() else []
        if used and func in FORMS and not _checkpointed():
            with self:
                return FORMS[func](*args, **kwargs)
        before = _edges(args) if used and func in IN_PLACE else {}
        with_data = any(self._depends_on_data(t) for t in tensors)
        if with_data and func in PICKS:
            self._picks_rows |= any(not t.is_floating_point() and t in self._data for t in tensors)
        output = func(*args, **kwargs)
        if func is Tensor.__setitem__:  # returns nothing, but its first argument has changed
            self._follow(func, args[0], made_of, with_data, args[0])
        if not isinstance(output, Tensor | tuple | list):
            return output
        if used and not with_data and isinstance(output, Tensor):
            layer = self._repeated(func, output, used, (args, kwargs))
            if layer is not None:
                output = self._to_be_written(_no_view(output))
                self._record(layer, output, {})
                self._data[output] = True
                return output
        if used and with_data and isinstance(output, Tensor):
            layer, output = _layer(func, output, used, (args, kwargs))
            if layer is not None:
                self._record(layer, output, before)
        self._follow(func, output, made_of, with_data, args[0] if args else None)
        return output

    def _follow(
        self,
        func: Callable[..., Any],
        output: Any,
        made_of: list[Source],
        with_data: bool,
        first: Any = None,
    ) -> None:
        """Take the outputs of a call for data if data went in, else for sources if sources did."""
        if made_of and not with_data:
            self._sources.derive(func, output, made_of)
        elif with_data:
            for tensor in tensors_in(output):
                self._sources.forget(tensor)
                self._data[tensor] = True
            if isinstance(first, Tensor) and output is first and first._base is not None:
                self._sources.forget(first._base)  # a view that data were written into
                self._data[first._base] = True
        elif torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    self._constants[tensor] = True

    def _depends_on_data(self, tensor: Tensor) -> bool:
        """Whether a tensor may differ between examples.

        Autograd functions written in Python hide their inputs here: what requires a gradient and
        comes from no call that was seen counts as data.
        """
        if self._sources.get(tensor) is not None:
            return False
        if tensor in self._data:
            return True
        return tensor.requires_grad and not tensor.is_leaf and tensor not in self._constants

    def _repeated(
        self,
        func: Callable[..., Any],
        output: Tensor,
        made_of: list[Source],
        arguments: tuple[Sequence[Any], Mapping[str, Any]],
    ) -> Layer | None:
        """What a call does that repeats a source over the examples; that is a use by each."""
        args, kwargs = arguments
        if func not in REPETITIONS:
            return None
        return REPETITIONS[func](output, self._n, made_of[0].tensor, *args, **kwargs)

    def _to_be_written(self, output: Tensor) -> Tensor:
        """Entries of their own in memory, where a nudge will write into them."""
        return output if self._nudge is None else output.clone()

    def _record(self, layer: Layer, output: Tensor, before: Mapping[int, Node]) -> None:
        """Keep a use; `before` holds the graph of data that the call has written into."""
        weight, bias = self._sources.get(layer.weight), self._sources.get(layer.bias)
        if weight is None and bias is None:  # the source came in as data
            return
        if prod(layer.matrix) != layer.weight.numel():
            raise UnsupportedUse(
                "a layer rule sees its weight as matrices of another size",
                where=next(source.params[0] for source in (weight, bias) if source is not None),
                got=f"{layer.matrix} for a weight of shape {tuple(layer.weight.shape)}",
                remedy="Let matrix=(b, o, i) hold each entry of the weight once",
            )
        below = list(layer.data)
        if weight is None:
            below.append(layer.weight)
        if bias is None and layer.bias is not None:
            below.append(layer.bias)
        nodes = tuple(
            before[id(t)] if id(t) in before else get_gradient_edge(t).node
            for t in below
            if id(t) in before or (t is not output and t.requires_grad)
        )
        if self._nudge is not None:
            self._nudge(len(self.uses), layer, output)
        edge = get_gradient_edge(output)
        self.uses.append(Use(layer, weight, bias, edge, nodes, len(self.uses)))

    def recording(self, output: Tensor) -> Recording:
        """Close the tape over the model's output.

        Walks the graph from it, stepping from a recorded call straight to its data.
        """
        steps = {use.edge.node: use.below for use in self.uses}
        loose: set[str] = set()
        in_python = False
        seen: set[Node] = set()
        stack = [get_gradient_edge(output).node] if output.requires_grad else []
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in steps:
                stack.extend(steps[node])
                continue
            _refuse_opaque(node)
            in_python |= isinstance(node, BackwardCFunction)
            name = self._names.get(id(getattr(node, "variable", None)))
            if name is not None:
                loose.add(name)
            stack.extend(below for below, _ in node.next_functions if below is not None)
        uses = tuple(use for use in self.uses if use.edge.node in seen)
        return Recording(output, uses, frozenset(loose), self._picks_rows, in_python)


#: Calls that may pick rows by indices or masks.
PICKS = {
    Tensor.__getitem__,
    Tensor.index_select,
    torch.index_select,
    Tensor.masked_select,
    torch.masked_select,
    Tensor.nonzero,
    torch.nonzero,
    torch.where,
    Tensor.where,
}
#: Calls with a rule that write into their first argument.
IN_PLACE = {Tensor.add_, Tensor.__iadd__}


def _checkpointed() -> bool:
    """Whether a checkpoint will run this part again, where a form would not replace the call."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _edges(args: Sequence[Any]) -> dict[int, Node]:
    """Graph nodes of tensors before a call that changes them."""
    return {id(t): get_gradient_edge(t).node for t in tensors_in(args) if t.requires_grad}


def _layer(
    func: Callable[..., Any],
    output: Tensor,
    made_of: Sequence[Source],
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
) -> tuple[Layer | None, Tensor]:
    """What a call in which sources meet data does, if a rule knows, and its output."""
    args, kwargs = arguments
    if not output.requires_grad or output.is_complex() or (func in IN_PLACE and output._is_view()):
        return None, output
    if func in OPERATORS and len(made_of) == 1:
        output = _no_view(output)
        return OPERATORS[func](output, made_of[0].tensor, *args, **kwargs), output
    if func in RULES:
        output = _no_view(output)
        return RULES[func](output, *args, **kwargs), output
    return None, output


def _no_view(output: Tensor) -> Tensor:
    """The same values as no view: writing into a view rewrites its history, and its edge."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _refuse_opaque(node: Node) -> None:
    """Re-entrant checkpointing hides the graph that the walk and the edges need."""
    if "CheckpointFunction" in node.name():
        raise UnsupportedUse(
            "re-entrant activation checkpointing hides the layers inside it",
            where="model",
            remedy="Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
        )
