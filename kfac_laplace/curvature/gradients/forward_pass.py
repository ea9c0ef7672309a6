"""One recorded forward pass over a batch, as data: outputs, and where parameters met which rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.example_copies import ExampleGraph
from kfac_laplace.curvature.gradients.groups import Group, Term, check_consistent
from kfac_laplace.curvature.gradients.knowledge import Knowledge, UseKey
from kfac_laplace.curvature.gradients.seen_rows import SeenRows, full, patterns
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import AnyBatch, with_examples
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.model.channels_last import ChannelsLast
from kfac_laplace.curvature.model.forward import Forward
from kfac_laplace.curvature.model.kept import without_trace
from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.recording.live_rows import irregular, reachable_rows
from kfac_laplace.curvature.recording.moved_rows import read_when_moved
from kfac_laplace.curvature.recording.tape import Nudge, Recording, Tape, Use
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.likelihoods import Likelihood


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward pass over a batch, read in the light of what is known about the model.

    Args:
        forward: runs the model.
        likelihood: aligns its outputs.
        recording: what the tape recorded.
        batch: the inputs.
        params: the tracked parameters that were used.
        knowledge: groups, class axis and row layouts.
        weights: weights of the outputs in the loss, broadcastable to (n, t, c), where they differ.
        budget: how much memory gradients may take.
        reordered: whether images had another order in memory than the model gave them.
        guarded: whether guards check calls where the model runs again.
        runs_again: whether the model may run again to tell which rows are read; a training pass,
            which draws and counts, may not.
    """

    forward: Forward
    likelihood: Likelihood
    recording: Recording
    batch: AnyBatch
    params: Mapping[str, Tensor]
    knowledge: Knowledge
    weights: Tensor | None = None
    budget: Budget = Budget()
    reordered: bool = False
    guarded: bool = True
    runs_again: bool = True

    def knowing(self, knowledge: Knowledge) -> "ForwardPass":
        """The same pass in the light of more."""
        return replace(self, knowledge=knowledge)

    def weighted(self, weights: Tensor | None) -> "ForwardPass":
        """The same pass with the weights of its outputs in the loss."""
        return replace(self, weights=weights)

    @property
    def device(self) -> torch.device:
        """Device of the outputs."""
        return self.recording.output.device

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.batch.n

    # --- outputs -----------------------------------------------------------------------------

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
        f = self.likelihood.align(self.recording.output, self.knowledge.class_axis)
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

    # --- uses of parameters ------------------------------------------------------------------

    @cached_property
    def terms(self) -> dict[str, list[Term]]:
        """For each group of layer matrices its uses, with the input rows that meet it."""
        check_consistent(self.knowledge.groups, self.recording)
        return {group.name: group.terms(self.recording) for group in self.knowledge.groups}

    @cached_property
    def uses(self) -> dict[str, list[int]]:
        """For each group the indices of its uses in the recording."""
        found = {name: [term.use for term in terms] for name, terms in self.terms.items()}
        for group in self.knowledge.groups:
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
        found = {group.name for group in self.knowledge.groups if group.role == "generic"}
        strange = set(self.recording.loose)
        for u, use in enumerate(self.recording.uses):
            if self._known_layout(u) is None:
                strange.update(use.params)
        for group in self.knowledge.groups:
            if group.role == "exact" and strange.intersection(group.layout.params):
                found.add(group.name)
        return frozenset(found)

    @cached_property
    def regular(self) -> tuple[Group, ...]:
        """The groups of layer matrices that this pass uses as earlier ones did, and uses at all.

        A pass that somebody else runs need not use all: it may skip layers at random, or add heads.
        """
        return tuple(group for group in self.knowledge.groups if self._is_regular(group))

    def _is_regular(self, group: Group) -> bool:
        if not group.factored or group.used_otherwise(self.recording):
            return False
        terms = group.terms(self.recording)
        return bool(terms) and all(self._lies_as_known(term.use) for term in terms)

    def _lies_as_known(self, u: int) -> bool:
        """Whether rows of a use lie as those of such a use did, and fit the batch."""
        names, (kind, axes, _) = self.key(u)
        layouts = self._layouts_by_kind.get((names, kind, axes), ())
        own = self._known_layout(u)
        if own is None or None in layouts or (self.n > 1 and own not in layouts):
            return False
        return self._in_batch(own).fits(self.recording.uses[u].layer.inputs.lead, self.n)

    @cached_property
    def _layouts_by_kind(self) -> dict[object, list[RowLayout | None]]:
        """Known layouts by parameters, kind and axes of uses, whichever their turn."""
        found: dict[object, list[RowLayout | None]] = {}
        for (names, (kind, axes, _)), layout in self.knowledge.row_layouts.items():
            found.setdefault((names, kind, axes), []).append(layout)
        return found

    def _in_batch(self, layout: RowLayout) -> RowLayout:
        """A layout with what it takes from the batch: the example of each node or edge."""
        if isinstance(layout, Segments):
            return Segments(layout.kind, self.batch.segments.get(layout.kind))
        return layout

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

    # --- examples on their own ---------------------------------------------------------------

    @cached_property
    def example_graph(self) -> ExampleGraph | None:
        """Outputs by copies of those parameters whose gradients no rule gives; None without any."""
        used = {name for use in self.recording.uses for name in use.params} | self.recording.loose
        copied = {
            name: self.params[name].detach()
            for group in self.knowledge.groups
            if group.name in self.without_rules and used.intersection(group.layout.params)
            for name in group.layout.params
        }
        if not copied:
            return None
        # With gradients, as in the model itself: a checkpoint that is recomputed in the backward
        # pass must save the same tensors in the same order.
        held = {name: p.detach().requires_grad_() for name, p in self.params.items()}

        def aligned(chosen: Mapping[str, Tensor], x: object) -> Tensor:
            output = self.forward(x, {**held, **chosen})
            if self.output_segments is None:
                output = self.knowledge.interface.with_examples(output, 1)
            return accumulable(self.likelihood.align(output, self.knowledge.class_axis))

        graph = ExampleGraph(aligned, copied, self.batch)
        graph.check(self.outputs.detach(), torch.finfo(self.recording.output.dtype).eps)
        if self.output_segments is None:
            own = {name: self.params[name] for name in copied}
            graph.check_padding(self.outputs, own, self.weights)
        return graph

    # --- rows --------------------------------------------------------------------------------

    def rows(self, vectors: Sequence[Tensor], groups: Sequence[Group]) -> dict[int, Tensor]:
        """Gradient rows (v, b, *lead, o) of the uses of `groups`, for vectors (n, t, c)."""
        wanted = sorted({u for group in groups for u in self.uses[group.name]})
        backward = Backward(self.recording, self.outputs, wanted)
        found: dict[int, list[Tensor]] = {}
        for vector in vectors:
            backward(vector, lambda u, rows: found.setdefault(u, []).append(rows))
        return {u: torch.cat(rows) if len(rows) > 1 else rows[0] for u, rows in found.items()}

    @cached_property
    def seen(self) -> SeenRows:
        """Rows that have received a gradient, to be filled in by who makes gradients."""
        return SeenRows()

    def live(self, u: int) -> Tensor:
        """Mask over the leading axes of a watched use's rows: those that outputs depend on."""
        masks = self.seen.masks
        if self.seen.settled or self._shown:
            return masks[u]
        reachable = self._read[0][u]
        return masks[u] | reachable if u in masks else reachable

    @cached_property
    def live_everywhere(self) -> set[int]:
        """Watched uses all of whose rows outputs depend on, once all vectors have been sent."""
        return full({u: self.live(u) for u in self.seen.incomplete})

    @property
    def reachable(self) -> list[Tensor]:
        """For each use a mask over the leading axes of its rows: those that outputs depend on."""
        return self._read[0]

    @property
    def learned(self) -> Knowledge:
        """What is known after all that was asked of this pass."""
        if "_read" not in vars(self):
            return self.knowledge
        known, (found, unread) = self.knowledge, self._read
        unread, unseen = known.unread | unread, known.unseen
        # Where gradients show all that is read, they need no backward pass beside them again.
        masks, read = self.seen.masks, self._patterns(dict(enumerate(found)))
        shown = self.seen.noted and all(torch.equal(found[u], masks[u]) for u in masks)
        if shown and read and read <= unread:
            unseen = unseen | self._patterns(masks)
        return replace(known, unread=unread, unseen=unseen)

    @cached_property
    def _shown(self) -> bool:
        """Whether rows without a gradient are as in earlier batches, where nothing read them."""
        if not self.knowledge.unseen or not self.seen.noted:
            return False
        found = self._patterns(self.seen.masks)
        return bool(found) and found <= self.knowledge.unseen

    @cached_property
    def _read(self) -> tuple[list[Tensor], frozenset[bytes]]:
        """Masks of the rows that are read, and the patterns found not to be, wherever they are."""
        vector = irregular(self.outputs, self.weights)
        reached = reachable_rows(self.recording, self.outputs, vector)
        unread = self._patterns(dict(enumerate(reached)))
        if (unread <= self.knowledge.unread and unread) or not self.runs_again:
            return reached, frozenset()
        recording, outputs = self.recording, self.outputs
        complete = all(bool(mask.all()) for mask in reached)
        with nullcontext() if complete else without_trace(self.forward.model):
            found, tried = read_when_moved(recording, reached, self._again, outputs, self.weights)
        settled = tried and all(
            torch.equal(mask, more) for mask, more in zip(reached, found, strict=True)
        )
        return found, unread if settled else frozenset()

    def _patterns(self, masks: Mapping[int, Tensor]) -> frozenset[bytes]:
        return patterns(masks, {u: self._known_layout(u) for u in masks}, self.n)

    def _again(self, nudge: Nudge) -> tuple[Recording, Tensor]:
        """Run the model again with something done to its recorded calls; with its outputs."""
        own = self.batch.copied()
        order = ChannelsLast() if self.reordered else nullcontext()
        with Tape(self.params, own.data, own.n, nudge, self.guarded) as tape, order:
            output = self.forward(own.x, self.params)
        recording = tape.recording(output)
        output = with_examples(recording.output, self.batch, self.knowledge.interface)
        again = replace(self, recording=replace(recording, output=output))
        return again.recording, again.outputs

    def row_layout(self, u: int) -> RowLayout:
        """Row layout of a use, or an error that asks for it."""
        use = self.recording.uses[u]
        row_layout = self._known_layout(u)
        if row_layout is None:
            raise UnsupportedUse(
                "cannot tell which rows belong to which example",
                where=use.params[0],
                got=f"rows of shape {use.layer.inputs.lead} for {self.n} examples",
                remedy="Keep the examples on one axis in this layer, begin with a batch of several "
                "examples, or freeze it",
            )
        row_layout = self._in_batch(row_layout)
        if not row_layout.fits(use.layer.inputs.lead, self.n):
            raise UnsupportedUse(
                "rows lie in another way than in earlier batches",
                where=use.params[0],
                got=f"rows of shape {use.layer.inputs.lead} for {self.n} examples",
                remedy="Rows that are packed or selected by the data cannot be assigned to "
                "examples: pad and mask instead, or freeze the layer",
            )
        return row_layout

    def _known_layout(self, u: int) -> RowLayout | None:
        known = self.knowledge.row_layouts
        return known.get(self.key(u), self._likely_layout(self.recording.uses[u]))

    def _likely_layout(self, use: Use) -> RowLayout:
        """What to take for the layout of rows while one example is all that was seen."""
        lead = use.layer.inputs.lead
        for kind, index in self.batch.segments.items():
            if self.n > 1 and lead and lead[0] == len(index):
                return Segments(kind)
        return Axis(0)
