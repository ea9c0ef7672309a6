"""Which rows of a layer belong to which example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class RowLayout(Protocol):
    """Which rows of a layer belong to which example."""

    def by_example(self, rows: Tensor, n: int, block_axis: int) -> Tensor:
        """Bring rows (..., b, *lead, d) into (..., b, n, t, d).

        Args:
            rows: the rows, with the leading axes right after the block axis.
            n: number of examples.
            block_axis: index of the block axis in `rows`.
        """

    def fits(self, lead: Sequence[int], n: int) -> bool:
        """Whether rows with these leading axes can lie like this for n examples."""


@dataclass(frozen=True)
class Segments:
    """Rows on the first leading axis, of which examples have different numbers.

    Args:
        kind: what the rows are, as the batch names its segments: "nodes", "edges".
        index: the example of each row; None until a batch fills it in.
    """

    kind: str
    index: Tensor | None = None

    def by_example(self, rows: Tensor, n: int, block_axis: int) -> Tensor:
        """Rows (..., b, n, t, d), t as many as the largest example has, zero where there are none.

        Further leading axes are more rows of the same example.
        """
        assert self.index is not None
        axis = block_axis + 1
        rows = rows.flatten(axis + 1, -2) if rows.ndim > axis + 2 else rows.unsqueeze(axis + 1)
        order, slots, most = _slots(self.index, n)
        out = rows.new_zeros((*rows.shape[:axis], n * most, *rows.shape[axis + 1 :]))
        out = out.index_copy(axis, slots, rows.index_select(axis, order))
        return out.unflatten(axis, (n, most)).flatten(axis + 1, axis + 2)

    def fits(self, lead: Sequence[int], n: int) -> bool:
        """Whether there are as many rows as the batch has of this kind."""
        return self.index is not None and len(lead) > 0 and lead[0] == len(self.index)

    def rows_of(self, padded: Tensor) -> Tensor:
        """Undo `by_example` for one tensor (n, t, ...): the rows in their own order."""
        assert self.index is not None
        order, slots, _ = _slots(self.index, len(padded))
        return padded.flatten(0, 1)[slots[order.argsort()]]


#: By index, which nobody changes, as long as it is there: each use and each vector asks for it.
_SLOTS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _slots(index: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Rows sorted by example, the place of each in a table of n · most slots, and this most."""
    found: dict[int, tuple[Tensor, Tensor, int]] = _SLOTS.setdefault(index, {})
    if n not in found:
        with torch.inference_mode(False):  # kept, so of use outside inference mode as well
            order = index.argsort(stable=True)
            owner, counts = index[order], torch.bincount(index, minlength=n)
            most = max(1, int(counts.max()))
            starts = counts.cumsum(0) - counts
            place = torch.arange(len(order), device=order.device) - starts[owner]
            found[n] = order, owner * most + place, most
    return found[n]


@dataclass(frozen=True)
class Axis:
    """An example axis among the leading axes of a layer's rows.

    Args:
        axis: leading axis that runs over examples, alone or flattened with others.
        minor: in a flattened axis, whether the example index runs fastest.
    """

    axis: int
    minor: bool = False

    def fits(self, lead: Sequence[int], n: int) -> bool:
        """Whether the axis divides into n examples."""
        return self.axis < len(lead) and lead[self.axis] % n == 0

    def by_example(self, rows: Tensor, n: int, block_axis: int) -> Tensor:
        """Rows (..., b, n, t, d) from rows (..., b, *lead, d)."""
        axis = block_axis + 1 + self.axis
        k = rows.shape[axis] // n
        rows = rows.unflatten(axis, (k, n) if self.minor else (n, k))
        rows = rows.movedim(axis + 1 if self.minor else axis, block_axis + 1)
        return rows.flatten(block_axis + 2, -2)


def consistent_row_layouts(
    touched: Sequence[Tensor], examples: Sequence[Tensor], segments: Mapping[str, Tensor]
) -> list[RowLayout]:
    """The layouts of rows that agree with which rows some examples' outputs touch.

    Args:
        touched: for each probe a mask over the leading axes of a layer's rows: where the gradient
            of the probed examples' outputs is not zero.
        examples: for each probe the mask (n,) of the examples probed.
        segments: example of each row, for kinds of rows of which examples have different numbers.

    Returns:
        Those under which no probe touches a row of an example outside it: segments, then
        batch-first, then others.
    """
    n, lead = len(examples[0]), touched[0].shape
    candidates: list[RowLayout] = [
        Segments(kind, index) for kind, index in segments.items() if lead and lead[0] == len(index)
    ]
    candidates += [
        Axis(axis, minor)
        for axis, length in enumerate(lead)
        if length and length % n == 0
        for minor in ((False, True) if length > n else (False,))
    ]
    return [
        row_layout
        for row_layout in candidates
        if not any(
            bool(_rows_by_example(row_layout, rows, n)[~probed.to(rows.device)].any())
            for rows, probed in zip(touched, examples, strict=True)
        )
    ]


def _rows_by_example(row_layout: RowLayout, rows: Tensor, n: int) -> Tensor:
    """A mask over the leading axes as (n, t)."""
    return row_layout.by_example(rows[None, ..., None], n, block_axis=0)[0, ..., 0]
