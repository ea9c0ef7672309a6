"""Gram matrices that lie in another memory than the rows that they are of."""

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import Gram, GramSum
from kfac_laplace.curvature.linalg.packed import packed_zeros


class AwaySum:
    """Adds rows up to a `Gram`, as `GramSum` does, whose products leave as soon as they are made.

    Args:
        b: number of stacks.
        i: width of the rows.
        like: a tensor on the device and in the precision of the rows.
        dtype: the precision of products and sums.
        home: where the sums lie.
    """

    def __init__(self, b: int, i: int, like: Tensor, dtype: SumDtype, home: torch.device):
        self._dtype = dtype
        one = packed_zeros(i, torch.empty(0, dtype=dtype.sums(like), device=home))
        self._packed = one.expand(b, -1, -1).clone()
        self._i = i

    def foresee(self, rows: int) -> None:
        """Nothing depends on how many rows will come."""

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        made = GramSum(len(rows), self._i, rows, self._dtype)
        made.add(rows, 0)
        own = self._packed[start : start + len(rows)]
        own.add_(made.gram().summed().to(own.device))

    def gram(self) -> Gram:
        """The sum."""
        return Gram(self._packed, self._packed.new_empty(len(self._packed), 0, self._i))
