"""Finds out which rows of a layer belong to which example, by a few backward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.knowledge import Knowledge, UseKey
from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments, consistent_row_layouts
from kfac_laplace.errors import UnsupportedUse


def learn_row_layouts(passed: ForwardPass) -> Knowledge:
    """See which rows the outputs of some examples touch, in each use that is not settled yet.

    A use is settled once a single layout of its rows agrees with what was seen. Until then
    batch-first is taken where it agrees, and a later contradiction is an error.

    Returns:
        What is known after this pass.

    Raises:
        UnsupportedUse: the rows contradict what earlier batches suggested.
    """
    known = passed.knowledge
    open_uses = [u for u in range(len(passed.recording.uses)) if passed.key(u) not in known.settled]
    if passed.n < 2 or not open_uses:
        return known
    touched: dict[int, list[Tensor]] = {u: [] for u in open_uses}
    halves = _halves(passed.n)
    backward = Backward(passed.recording, passed.outputs, open_uses)

    def receive(u: int, rows: Tensor) -> None:
        touched[u].append((rows[0] != 0).any(-1).any(0))  # (*lead)

    for half in halves:
        backward(_probe(passed.outputs, half), receive)
    layouts, settled = dict(known.row_layouts), set(known.settled)
    for u in open_uses:
        if len(touched[u]) == len(halves):
            candidates = consistent_row_layouts(touched[u], halves, passed.batch.segments)
            # What belongs to one batch is left out: its segments' index.
            kinds = [Segments(c.kind) if isinstance(c, Segments) else c for c in candidates]
            layout = layouts[passed.key(u)] = _agreed(passed, u, layouts, kinds)
            if len(kinds) < 2 and not _may_move(passed, u, layout):
                settled.add(passed.key(u))
    return replace(known, row_layouts=layouts, settled=frozenset(settled))


def _agreed(
    passed: ForwardPass,
    u: int,
    layouts: Mapping[UseKey, RowLayout | None],
    kinds: Sequence[RowLayout],
) -> RowLayout | None:
    """The layout of a use: the known one, else the first that agrees; an error if they differ."""
    if passed.key(u) not in layouts:
        return kinds[0] if kinds else None
    layout = layouts[passed.key(u)]
    if layout is not None and layout not in kinds:
        raise UnsupportedUse(
            "rows lie in another way than earlier batches suggested",
            where=passed.recording.uses[u].params[0],
            remedy="Begin with a batch in which every example reaches this layer",
        )
    return layout


def _may_move(passed: ForwardPass, u: int, row_layout: RowLayout | None) -> bool:
    """Whether rows that fit today may belong to others tomorrow: picked by the data and flattened.

    An axis as long as the batch, or the nodes of graphs, show by their length that they are whole.
    """
    if not passed.recording.picks_rows or not isinstance(row_layout, Axis):
        return False
    return passed.recording.uses[u].layer.inputs.lead[row_layout.axis] != passed.n


def _probe(outputs: Tensor, half: Tensor) -> Tensor:
    """A backward vector from the examples of a mask (n,) alone."""
    # Irregular weights: equal ones could cancel in a softmax or a normalisation.
    weights = torch.arange(1, outputs[0].numel() + 1, dtype=outputs.dtype, device="cpu").sqrt()
    probe = half.to(outputs.dtype)[:, None] * weights
    return probe.reshape(outputs.shape).to(outputs.device)


def _halves(n: int) -> list[Tensor]:
    """Masks (n,) that tell examples apart: each alone if few, else two random halvings."""
    if n <= 4:
        return list(torch.eye(n, dtype=torch.bool, device="cpu"))
    generator = torch.Generator().manual_seed(0)
    masks = []
    for _ in range(2):
        half = torch.zeros(n, dtype=torch.bool, device="cpu")
        half[torch.randperm(n, generator=generator, device="cpu")[: n // 2]] = True
        masks += [half, ~half]
    return masks
