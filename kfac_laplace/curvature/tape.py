"""Records every use of the tracked parameters during one forward pass.

A `TorchFunctionMode` sees each functional call that receives a tracked parameter, whatever module
made it. For calls with a layer rule it keeps what the rule says and the gradient edge of the
output, taken at once, so that later in-place operations do no harm. Afterwards a walk through the
autograd graph that steps over the recorded calls finds every parameter which reaches the output in
any other way: no use passes unnoticed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from kfac_laplace.curvature.layers import RULES, Layer
from kfac_laplace.errors import UnsupportedUse


@dataclass(frozen=True)
class Use:
    """One recorded call: the layer it makes, the parameters it uses, the edge of its output."""

    layer: Layer
    weight: str | None
    bias: str | None
    edge: GradientEdge

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the tracked parameters used."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class Recording:
    """A forward pass: its output, its recorded uses, and the parameters used in other ways.

    Args:
        output: what the model returned.
        uses: recorded calls in forward order.
        loose: names of the tracked parameters that reach the output outside recorded calls.
    """

    output: Tensor
    uses: tuple[Use, ...]
    loose: frozenset[str]

    def output_rows(
        self, outputs: Tensor, vectors: Sequence[Tensor], uses: Sequence[int] | None = None
    ) -> list[Tensor | None]:
        """Backpropagate vectors to the outputs of the recorded calls, and no further.

        Args:
            outputs: a tensor of this pass's graph.
            vectors: v tensors shaped like `outputs`.
            uses: indices of the uses wanted; all by default.

        Returns:
            For each use wanted, gradient rows (v, b, *lead, o), or None where `outputs` does not
            depend on it.
        """
        wanted = self.uses if uses is None else [self.uses[u] for u in uses]
        if not wanted or not outputs.requires_grad:
            return [None] * len(wanted)
        edges = [use.edge for use in wanted]
        passes = [
            torch.autograd.grad(outputs, edges, vector, retain_graph=True, allow_unused=True)
            for vector in vectors
        ]
        rows: list[Tensor | None] = []
        for use, grads in zip(wanted, zip(*passes, strict=True), strict=True):
            known = [grad for grad in grads if grad is not None]
            rows.append(use.layer.output_rows(torch.stack(known)) if known else None)
        return rows


class Tape(TorchFunctionMode):
    """Collects the uses of tracked tensors while it is active.

    Args:
        tracked: parameter names and the tensors that the model will use for them.
    """

    def __init__(self, tracked: Mapping[str, Tensor]):
        super().__init__()
        self._names = {id(tensor): name for name, tensor in tracked.items()}
        self.uses: list[Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call and record it if a rule knows it and a tracked parameter takes part."""
        output = func(*args, **(kwargs or {}))
        rule = RULES.get(func)
        if rule is not None and isinstance(output, Tensor) and output.requires_grad:
            if any(id(value) in self._names for value in (*args, *(kwargs or {}).values())):
                if output._is_view():
                    # An in-place operation on a view rewrites its history, and with it the edge.
                    output = torch.ops.aten._unsafe_view(output, output.shape)
                layer = rule(output, *args, **(kwargs or {}))
                if layer is not None:
                    self._record(layer, output)
        return output

    def _record(self, layer: Layer, output: Tensor) -> None:
        weight, bias = self._names.get(id(layer.weight)), self._names.get(id(layer.bias))
        if weight is None and bias is None:  # the tracked parameter came in as data
            return
        self.uses.append(Use(layer, weight, bias, get_gradient_edge(output)))

    def recording(self, output: Tensor) -> Recording:
        """Close the tape over the model's output."""
        return Recording(output, tuple(self.uses), self._loose(output))

    def _loose(self, output: Tensor) -> frozenset[str]:
        """Walk the graph from the output, stepping from a recorded call straight to its data."""
        steps: dict[Node, list[Node]] = {}
        for use in self.uses:
            steps[use.edge.node] = self._below(use)
        found: set[str] = set()
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
            name = self._names.get(id(getattr(node, "variable", None)))
            if name is not None:
                found.add(name)
            stack.extend(below for below, _ in node.next_functions if below is not None)
        return frozenset(found)

    def _below(self, use: Use) -> list[Node]:
        """Graph nodes under a recorded call: its data, and an untracked weight or bias."""
        tensors = list(use.layer.data)
        if use.weight is None:
            tensors.append(use.layer.weight)
        if use.bias is None and use.layer.bias is not None:
            tensors.append(use.layer.bias)
        return [get_gradient_edge(t).node for t in tensors if t.requires_grad]


def _refuse_opaque(node: Node) -> None:
    """Re-entrant checkpointing hides the graph that the walk and the edges need."""
    if "CheckpointFunction" in node.name():
        raise UnsupportedUse(
            "re-entrant activation checkpointing hides the layers inside it",
            where="model",
            remedy="Call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
        )
