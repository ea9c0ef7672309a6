"""A model as the backend sees it: its tracked parameters, its groups, one recorded pass a batch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.forward import Batch, as_output, call_with, device_of, unwrap
from kfac_laplace.curvature.generic import ExampleGraph
from kfac_laplace.curvature.groups import Group, Subset, find_groups, last_layer, select_parameters
from kfac_laplace.curvature.layers.registry import Inputs
from kfac_laplace.curvature.outer import Outer
from kfac_laplace.curvature.precision import accumulable
from kfac_laplace.curvature.sharing import Grouping
from kfac_laplace.curvature.tape import Recording, Tape
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import Likelihood

UseKey = tuple[tuple[str, ...], int]


@dataclass
class Network:
    """What is known about a model: which parameters are tracked, their groups, the row layouts.

    Args:
        model: the caller's model, unwrapped.
        likelihood: gives the class axis of the outputs.
        subset: `subset_of_weights`.
        joint_bias: whether weight and bias share a block.
    """

    model: nn.Module
    likelihood: Likelihood
    subset: Subset
    joint_bias: bool
    groups: tuple[Group, ...] = ()
    class_axis: int = -1
    groupings: dict[UseKey, Grouping | None] = field(default_factory=dict)
    settled: set[UseKey] = field(default_factory=set)
    listed: bool = False  # what has no Kronecker factors, in the log
    warned: bool = False  # of gradients that cancel under reduce
    row_entries: int = 1  # gradient rows of one example and vector, all recorded calls together

    def __post_init__(self) -> None:
        """Unwrap the model and pick the tracked parameters."""
        self.model = unwrap(self.model)
        params = dict(self.model.named_parameters())
        trainable = [name for name, p in params.items() if p.requires_grad]
        shapes = {name: p.shape for name, p in params.items()}
        self.tracked = select_parameters(shapes, trainable, self.subset)
        if not self.tracked:
            raise InvalidValue(
                "no trainable parameter",
                where="model",
                got=f"{len(params)} parameters",
                remedy="Set requires_grad, or widen subset_of_weights",
            )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return device_of(self.model)

    def live_parameters(self) -> dict[str, Tensor]:
        """The tracked parameters as they are in the model now."""
        params = dict(self.model.named_parameters())
        return {name: params[name] for name in self.tracked}

    def batch(self, x: Any) -> Batch:
        """Inputs on the model's device; `InvalidValue` if there are none."""
        batch = x if isinstance(x, Batch) else Batch(x, self.device)
        if batch.n == 0:
            raise InvalidValue(
                "a batch without examples", where="x", got="0 examples", remedy="Drop it"
            )
        return batch

    def run(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> "Pass":
        """Record a forward pass at `params` (the model's own by default)."""
        if params is None:
            used = self.live_parameters()
        else:
            used = {name: p.detach().requires_grad_() for name, p in params.items()}
        args, kwargs = batch.arguments()
        with Tape(used) as tape:
            if params is None:
                output = as_output(self.model(*args, **kwargs))
            else:
                output = as_output(call_with(self.model, used, args, kwargs))
        return Pass(self, tape.recording(output), batch, used)

    def check_examples(self, passed: "Pass") -> None:
        """An example alone must give what it gives in the batch.

        Otherwise inputs shared by all examples were taken for batches. One input tensor cannot be.
        """
        batch = passed.batch
        if len(batch.by_example) < 2 or batch.n < 2:
            return
        last = torch.tensor([batch.n - 1])
        with torch.no_grad():
            args, kwargs = batch.select(last).arguments()
            alone = accumulable(as_output(self.model(*args, **kwargs)))
        together = accumulable(passed.recording.output.detach())[-1:]
        eps = torch.finfo(passed.recording.output.dtype).eps
        close = alone.shape == together.shape and torch.allclose(
            alone, together, rtol=eps**0.5, atol=eps**0.5 * float(together.abs().max())
        )
        if not close:
            raise UnsupportedUse(
                "an example alone gives another output than in its batch",
                where="model",
                got=f"several inputs whose first axis has length {batch.n}",
                remedy="Inputs shared by all examples (masks, positions) must not look like "
                "batches: give them a leading axis of 1, or use another batch size",
            )

    def remember(self, other: "Network") -> None:
        """Take over from the same model how rows lie in its layers: no need to probe again."""
        self.groupings |= other.groupings
        self.settled |= other.settled
        self.warned |= other.warned
        self.listed |= other.listed

    def learn(self, first: "Pass") -> None:
        """Find groups (and with "last_layer" the tracked parameters) from the first pass."""
        recording = first.recording
        if self.subset == "last_layer":
            chosen = last_layer(recording)
            self.tracked = [name for name in self.tracked if name in chosen]
        params = dict(self.model.named_parameters())
        shapes = {name: params[name].shape for name in self.tracked}
        ungrouped = {
            name
            for (params, _), grouping in self.groupings.items()
            if grouping is None
            for name in params
        }
        self.groups = find_groups(recording, shapes, self.joint_bias, frozenset(ungrouped))
        layers = [use.layer for use in recording.uses]
        entries = sum(prod(la.inputs.lead) * la.matrix[0] * la.matrix[1] for la in layers)
        self.row_entries = max(1, entries // first.n)


class Pass:
    """One recorded forward pass over a batch, and gradients of its outputs by group."""

    def __init__(
        self, network: Network, recording: Recording, batch: Batch, params: Mapping[str, Tensor]
    ):
        self.network = network
        self.recording = recording
        self.batch = batch
        self.params = params
        self._graph: ExampleGraph | None = None

    @cached_property
    def outputs(self) -> Tensor:
        """Aligned outputs f (n, t, c), at least float32, in the graph."""
        f = self.network.likelihood.align(self.recording.output, self.network.class_axis)
        return accumulable(f)

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.recording.output.shape[0]

    def rows(self, vectors: Sequence[Tensor], groups: Sequence[Group]) -> dict[int, Tensor]:
        """Gradient rows (v, b, *lead, o) of the uses of `groups`, for vectors (n, t, c)."""
        wanted = sorted({u for group in groups for u, _ in self.terms[group.name]})
        found = self.recording.output_rows(self.outputs, vectors, wanted)
        return {
            u: accumulable(rows.detach())
            for u, rows in zip(wanted, found, strict=True)
            if rows is not None
        }

    @cached_property
    def terms(self) -> dict[str, list[tuple[int, Inputs]]]:
        """For each group its uses in this pass, with the input rows that meet it."""
        self._check_consistent()
        return {group.name: group.terms(self.recording) for group in self.network.groups}

    def _check_consistent(self) -> None:
        """A parameter grouped as a layer's must be used as such in every batch."""
        for group in self.network.groups:
            loose = self.recording.loose.intersection(group.layout.params)
            if group.role != "generic" and loose:
                raise UnsupportedUse(
                    "used in another way than in the first batch",
                    where=sorted(loose)[0],
                    remedy="Use parameters in the same way in every batch, or freeze this one",
                )

    def outer(self, group: Group, rows: Mapping[int, Tensor]) -> Outer | None:
        """Factored per-example gradients of a group: its uses are more shared positions."""
        left, right = [], []
        for u, inputs in self.terms[group.name]:
            if u in rows:
                grouping = self.grouping(u)
                left.append(grouping.by_example(group.own_rows(rows[u]), self.n, block_axis=1))
                right.append(grouping.by_example(inputs.rows(), self.n, block_axis=0))
        if not left:
            return None
        rows_left = torch.cat(left, 3)
        return Outer(rows_left, torch.cat(right, 2).to(rows_left.dtype))

    def gradients(
        self, groups: Sequence[Group], rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Per-example gradients (v, n, *shape) by parameter, of those that have any."""
        found: dict[str, Tensor] = {}
        for group in groups:
            outer = None if group.name in generic else self.outer(group, rows)
            if group.name in generic:
                found |= group.layout.unpack(generic[group.name])
            elif outer is not None:
                found |= group.layout.unpack(outer.dense())
        return found

    def generic_gradients(
        self, groups: Sequence[Group], vectors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Per-example gradients (v, n, b, o, i) of those groups that have no layer rule.

        Args:
            groups: groups of any role; layers and unused parameters are passed over.
            vectors: v backward vectors (n, t, c).
        """
        graph = self._example_graph(groups)
        if graph is None:
            return {}
        passes = [graph.gradients(vector) for vector in vectors]
        return {
            group.name: accumulable(
                torch.stack([group.layout.pack(gradients) for gradients in passes])
            )
            for group in groups
            if group.name in passes[0]
        }

    def _example_graph(self, groups: Sequence[Group]) -> ExampleGraph | None:
        """The graph that gives the generic groups' gradients, made once a pass."""
        reached = self._generic_parameters(groups)
        if not reached:
            return None
        if self._graph is None:
            network = self.network
            # With gradients, as in the model itself: a checkpoint that is recomputed in the
            # backward pass must save the same tensors in the same order.
            held = {n: p.detach().requires_grad_() for n, p in self.params.items()}

            def forward(chosen: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
                args, kwargs = self.batch.with_examples(inputs)
                params = {**held, **chosen}
                output = as_output(call_with(network.model, params, args, kwargs))
                return accumulable(network.likelihood.align(output, network.class_axis))

            self._graph = ExampleGraph(forward, reached, self.batch.by_example)
            eps = torch.finfo(self.recording.output.dtype).eps
            self._graph.check(self.outputs.detach(), eps)
        return self._graph

    def _generic_parameters(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Parameters of the generic groups that this pass used."""
        used = {name for use in self.recording.uses for name in use.params}
        used |= self.recording.loose
        names = [g.name for g in groups if g.role == "generic" and g.name in used]
        return {name: self.params[name].detach() for name in names}

    def grouping(self, u: int) -> Grouping:
        """Row layout of a use, or an error that asks for it."""
        use = self.recording.uses[u]
        grouping = self.network.groupings.get(self.key(u), Grouping(0))
        if grouping is None:
            raise UnsupportedUse(
                "cannot tell which rows belong to which example",
                where=use.params[0],
                got=f"rows of shape {use.layer.inputs.lead} for {self.n} examples",
                remedy="Keep the examples on one axis in this layer, begin with a batch of several "
                "examples, or freeze it",
            )
        return grouping

    def key(self, u: int) -> UseKey:
        """A use's parameters and how often they were used before in this pass."""
        return self._keys[u]

    @cached_property
    def _keys(self) -> list[UseKey]:
        seen: Counter[tuple[str, ...]] = Counter()
        keys = []
        for use in self.recording.uses:
            keys.append((use.params, seen[use.params]))
            seen[use.params] += 1
        return keys
