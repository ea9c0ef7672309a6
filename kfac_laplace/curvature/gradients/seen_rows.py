"""Rows of a pass that have received a gradient: what shows itself need not be looked for."""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from kfac_laplace.curvature.model.tensors import has_values
from kfac_laplace.curvature.recording.live_rows import SMALLEST, is_nonzero
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout

#: Most rows that are not zero show it in their first entries.
SOME_COLUMNS = 16


class SeenRows:
    """Which rows of some uses have received a gradient of any vector so far."""

    def __init__(self) -> None:
        self._masks: dict[int, Tensor | None] = {}
        self._complete: set[int] = set()
        self._turns: dict[int, int] = {}  # vectors noted, by use, of rows on a device
        self._asked = 1  # so many of them when the device was asked last
        self._unasked = False
        #: Whether it is settled which rows count beside those that receive a gradient.
        self.settled = False

    def watch(self, use: int) -> None:
        """Look at the rows of a use from now on."""
        self._masks.setdefault(use, None)

    @property
    def watches(self) -> bool:
        """Whether any use is watched."""
        return bool(self._masks)

    def note(self, use: int, rows: Tensor) -> None:
        """Remember which of the gradient rows (1, b, *lead, o) are not zero, until all were.

        Args:
            use: index in the recording; uses that are not watched are passed over.
            rows: of one vector.
        """
        if use not in self._masks or use in self._complete:
            return
        if not has_values(rows):
            self._complete.add(use)
            return
        on_cpu = rows.device.type == "cpu"
        known, seen = self._masks[use], (_nonzero_rows if on_cpu else _nonzero_in_all)(rows)
        seen = seen if known is None else known | seen
        self._masks[use] = seen
        if on_cpu:
            self._complete.update([use] if bool(seen.all()) else [])
            return
        # A device is asked for all uses at once, and more and more seldom.
        self._turns[use] = self._turns.get(use, 0) + 1
        self._unasked = True
        if self._turns[use] > self._asked:
            self._asked *= 2
            self._ask()

    def _ask(self) -> None:
        """See of which uses all rows have received a gradient."""
        if self._unasked:
            self._complete |= full({u: m for u, m in self.masks.items() if u not in self._complete})
        self._unasked = False

    def settle(self, rows: Mapping[int, Tensor] | None) -> None:
        """Have these rows of watched uses count, and of all others those that receive a gradient.

        Args:
            rows: by use a mask over the leading axes of its rows; None: all rows count.
        """
        self.settled = True
        if rows is None:
            self._complete.update(self._masks)
            return
        for use, known in self._masks.items():
            self._masks[use] = rows[use] if known is None else known | rows[use]

    def all_of(self, use: int) -> bool:
        """Whether every row counts: all have been seen, or the use is not watched."""
        self._ask()
        return use in self._complete or use not in self._masks

    @property
    def incomplete(self) -> list[int]:
        """Watched uses with rows that were not seen."""
        return [use for use in self._masks if use not in self._complete]

    @property
    def masks(self) -> dict[int, Tensor]:
        """By watched use a mask over the leading axes of its rows; none of uses never noted."""
        return {use: mask for use, mask in sorted(self._masks.items()) if mask is not None}

    @property
    def noted(self) -> bool:
        """Whether rows of all watched uses have come."""
        return None not in self._masks.values()


def full(masks: Mapping[int, Tensor]) -> set[int]:
    """Which of some masks hold everywhere; a device is asked once for all."""
    told = torch.stack([mask.all() for mask in masks.values()]).tolist() if masks else []
    return {use for use, everywhere in zip(masks, told, strict=True) if everywhere}


def patterns(
    masks: Mapping[int, Tensor], layouts: Mapping[int, RowLayout | None], n: int
) -> frozenset[bytes]:
    """Which rows of an example are in some masks, as digests; none where rows are not in order.

    Args:
        masks: over the leading axes of the rows, by use.
        layouts: how these rows lie.
        n: number of examples.
    """
    parts = []
    for u, mask in masks.items():
        layout = layouts[u]
        if not isinstance(layout, Axis) or not layout.fits(mask.shape, n):
            return frozenset()
        parts.append(layout.by_example(mask[None, ..., None], n, 0)[0, ..., 0])
    if not parts:
        return frozenset()
    joint, which = torch.cat(parts, 1).cpu().numpy(), str([*masks]).encode()
    return frozenset(blake2b(which + row.tobytes(), digest_size=16).digest() for row in joint)


def _nonzero_rows(rows: Tensor) -> Tensor:
    """Which rows (1, b, *lead, o) have an entry that is not zero in any block, shape (*lead)."""
    # One column takes 11 µs in place of 100 for 16, of 1,600 rows on one core, and behind smooth
    # functions it suffices.
    if rows.numel() and _all_nonzero(rows[..., 0]):
        return torch.ones((), dtype=torch.bool, device=rows.device).expand(rows.shape[2:-1])
    first = is_nonzero(rows[..., :SOME_COLUMNS]).any(-1).flatten(0, 1).any(0)
    if rows.shape[-1] <= SOME_COLUMNS or bool(first.all()):
        return first
    others = rows[..., SOME_COLUMNS:].movedim((0, 1), (-3, -2))[~first]  # (m, 1, b, o)
    first[~first] = is_nonzero(others).flatten(1).any(1)
    return first


def _nonzero_in_all(rows: Tensor) -> Tensor:
    """The same of all entries, without a wait for the device."""
    return is_nonzero(rows).any(-1).flatten(0, 1).any(0)


def _all_nonzero(entries: Tensor) -> bool:
    """Whether `is_nonzero` holds for every entry."""
    least, most = entries.abs().aminmax()
    return SMALLEST <= float(least) and float(most) < torch.inf
