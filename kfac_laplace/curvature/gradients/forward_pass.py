"""One recorded forward pass over a batch, and gradients of its outputs by group."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.by_group import exact_pieces
from kfac_laplace.curvature.gradients.example_copies import ExampleGraph
from kfac_laplace.curvature.gradients.groups import Group, Term
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.budget import Budget, at_once
from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.recording.live_rows import reachable_rows
from kfac_laplace.curvature.recording.tape import Recording, Use
from kfac_laplace.curvature.rows.per_example import Factored, joined
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments
from kfac_laplace.errors import UnsupportedUse

if TYPE_CHECKING:
    from kfac_laplace.curvature.gradients.network import Network

UseKey = tuple[tuple[str, ...], tuple[str, int, int]]
Rows = Mapping[int, Tensor]


class Pass:
    """A forward pass over a batch: its outputs, and their gradients by group.

    Args:
        network: what is known about the model.
        recording: what the tape recorded.
        batch: the inputs.
        params: the tracked parameters that were used.
    """

    def __init__(
        self,
        network: "Network",
        recording: Recording,
        batch: AnyBatch,
        params: Mapping[str, Tensor],
    ):
        self.network = network
        self.recording = recording
        self.batch = batch
        self.params = params
        self.counted: Tensor | None = None  # weights of the outputs in the loss, if they differ
        self._graph: ExampleGraph | None = None

    @cached_property
    def reachable(self) -> list[Tensor]:
        """For each use a mask over the leading axes of its rows: those that outputs depend on."""
        return reachable_rows(self.recording, self.outputs, self.counted)

    @property
    def budget(self) -> Budget:
        """How much memory gradients may take."""
        return self.network.budget

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.batch.n

    @cached_property
    def output_segments(self) -> Segments | None:
        """Which example each output row belongs to, where rows are nodes; None where examples."""
        nodes = self.batch.segments.get("nodes")
        rows = self.recording.output.shape[0]
        if nodes is None or rows == self.n or rows != len(nodes):
            return None
        return Segments("nodes", nodes)

    @cached_property
    def output_rows(self) -> Tensor:
        """Aligned outputs (rows, t, c), at least float32, in the graph, by example or node."""
        f = self.network.likelihood.align(self.recording.output, self.network.class_axis)
        return accumulable(f)

    @cached_property
    def outputs(self) -> Tensor:
        """Aligned outputs f (n, t, c) in the graph; the nodes of a graph are positions."""
        return self.by_example(self.output_rows)

    def by_example(self, rows: Tensor) -> Tensor:
        """Values of the output rows (rows, t, ...) as (n, t, ...), zero for nodes that are not."""
        if self.output_segments is None:
            return rows
        flat = rows.reshape(1, *rows.shape[:2], -1)
        padded = self.output_segments.by_example(flat, self.n, block_axis=0)[0]
        return padded.reshape(*padded.shape[:2], *rows.shape[2:])

    def rows(self, vectors: Sequence[Tensor], groups: Sequence[Group]) -> dict[int, Tensor]:
        """Gradient rows (v, b, *lead, o) of the uses of `groups`, for vectors (n, t, c)."""
        wanted = sorted({u for group in groups for u in self.uses[group.name]})
        backward = Backward(self.recording, self.outputs, wanted)
        found: dict[int, list[Tensor]] = {}
        for vector in vectors:
            backward(vector, lambda u, rows: found.setdefault(u, []).append(rows))
        return {u: torch.cat(rows) if len(rows) > 1 else rows[0] for u, rows in found.items()}

    @cached_property
    def terms(self) -> dict[str, list[Term]]:
        """For each group of layer matrices its uses, with the input rows that meet it."""
        self._check_consistent()
        return {group.name: group.terms(self.recording) for group in self.network.groups}

    @cached_property
    def uses(self) -> dict[str, list[int]]:
        """For each group the indices of its uses in the recording."""
        found = {name: [term.use for term in terms] for name, terms in self.terms.items()}
        for group in self.network.groups:
            if group.role == "exact" and group.name not in self.without_rules:
                found[group.name] = [
                    u
                    for u, use in enumerate(self.recording.uses)
                    if set(group.layout.params).intersection(use.params)
                ]
        return found

    @cached_property
    def without_rules(self) -> frozenset[str]:
        """Groups whose gradients this pass takes from copies of the parameters by example.

        Exact groups have the same blocks either way: what looks like a layer in one batch may not
        in another, where the number of examples is another.
        """
        found = {group.name for group in self.network.groups if group.role == "generic"}
        strange = set(self.recording.loose)
        for u, use in enumerate(self.recording.uses):
            known = self.network.row_layouts.get(self.key(u), self._likely_row_layout(use))
            if known is None:
                strange.update(use.params)
        for group in self.network.groups:
            if group.role == "exact" and strange.intersection(group.layout.params):
                found.add(group.name)
        return frozenset(found)

    def _check_consistent(self) -> None:
        """A parameter grouped by its uses must be used in the same ways in every batch."""
        for group in self.network.groups:
            names = set(group.layout.params)
            strange = group.factored and any(
                not use.layer.kronecker or source.own_part is None
                for use in self.recording.uses
                for source in use.sources
                if names.intersection(source.params)
            )
            if group.factored and (strange or self.recording.loose & names):
                raise UnsupportedUse(
                    "used in another way than in the first batch",
                    where=sorted(names)[0],
                    remedy="Use parameters in the same way in every batch, or freeze this one",
                )

    def gradient(self, group: Group, rows: Rows) -> Factored | None:
        """Factored per-example gradients of a group of layer matrices, all its uses together."""
        parts = []
        for term in self.terms[group.name]:
            if term.use in rows:
                row_layout = self.row_layout(term.use)
                own = row_layout.by_example(group.own_rows(rows[term.use]), self.n, block_axis=1)
                parts.append((term.start, term.inputs.gradients(own, row_layout, self.n)))
        return joined(parts, group.layout.matrix[0]) if parts else None

    def pieces(self, group: Group, rows: Rows, generic: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Per-example gradients (v, m, b, o, i) of a group, m examples at a time, in order."""
        if group.name in generic:
            yield generic[group.name]
        elif group.name in self.without_rules:
            return
        elif group.role == "exact":
            yield from exact_pieces(self, group, rows)
        else:
            factored = self.gradient(group, rows)
            if factored is not None:
                limit = self.budget.gradients(factored.left)
                step = at_once(len(factored.left) * group.layout.size, limit)
                for piece in factored.pieces(step):
                    yield piece.dense()

    def gradients(
        self, groups: Sequence[Group], rows: Rows, generic: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Per-example gradients (v, n, *shape) by parameter, of those that have any."""
        found: dict[str, Tensor] = {}
        for group in groups:
            pieces = list(self.pieces(group, rows, generic))
            if pieces:
                found |= group.layout.unpack(torch.cat(pieces, 1))
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
            self._graph = ExampleGraph(self._forward_one, reached, self.batch)
            eps = torch.finfo(self.recording.output.dtype).eps
            self._graph.check(self.outputs.detach(), eps)
        return self._graph

    @cached_property
    def _held(self) -> dict[str, Tensor]:
        # With gradients, as in the model itself: a checkpoint that is recomputed in the backward
        # pass must save the same tensors in the same order.
        return {name: p.detach().requires_grad_() for name, p in self.params.items()}

    def _forward_one(self, chosen: Mapping[str, Tensor], x: object) -> Tensor:
        """Aligned outputs (rows, t, c) at inputs x with some parameters replaced."""
        network = self.network
        output = network.forward(x, {**self._held, **chosen})
        return accumulable(network.likelihood.align(output, network.class_axis))

    def _generic_parameters(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """Parameters of the generic groups that this pass used."""
        used = {name for use in self.recording.uses for name in use.params}
        used |= self.recording.loose
        return {
            name: self.params[name].detach()
            for group in groups
            if group.name in self.without_rules and used.intersection(group.layout.params)
            for name in group.layout.params
        }

    def row_layout(self, u: int) -> RowLayout:
        """Row layout of a use, or an error that asks for it."""
        use = self.recording.uses[u]
        row_layout = self.network.row_layouts.get(self.key(u), self._likely_row_layout(use))
        if row_layout is None:
            raise UnsupportedUse(
                "cannot tell which rows belong to which example",
                where=use.params[0],
                got=f"rows of shape {use.layer.inputs.lead} for {self.n} examples",
                remedy="Keep the examples on one axis in this layer, begin with a batch of several "
                "examples, or freeze it",
            )
        if isinstance(row_layout, Segments):
            row_layout = Segments(row_layout.kind, self.batch.segments.get(row_layout.kind))
        if not row_layout.fits(use.layer.inputs.lead, self.n):
            raise UnsupportedUse(
                "rows lie in another way than in earlier batches",
                where=use.params[0],
                got=f"rows of shape {use.layer.inputs.lead} for {self.n} examples",
                remedy="Rows that are packed or selected by the data cannot be assigned to "
                "examples: pad and mask instead, or freeze the layer",
            )
        return row_layout

    def _likely_row_layout(self, use: Use) -> RowLayout:
        """What to take for the layout of rows while one example is all that was seen."""
        lead = use.layer.inputs.lead
        for kind, index in self.batch.segments.items():
            if self.n > 1 and lead and lead[0] == len(index):
                return Segments(kind)
        return Axis(0)

    def key(self, u: int) -> UseKey:
        """A use's parameters and how often they were used before in this pass."""
        return self._keys[u]

    @cached_property
    def _keys(self) -> list[UseKey]:
        seen: Counter[tuple[object, ...]] = Counter()
        keys = []
        for use in self.recording.uses:
            kind = (use.params, type(use.layer.inputs).__name__, len(use.layer.inputs.lead))
            keys.append((use.params, (*kind[1:], seen[kind])))
            seen[kind] += 1
        return keys
