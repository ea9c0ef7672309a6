"""The block of the leading directions of the whole GGN, and the sum that makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.estimate.accumulators import WholeGradients
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.structures import LowRank
from kfac_laplace.curvature.gradients.by_group import flat_gradients
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable, in_double
from kfac_laplace.curvature.linalg.leading import leading
from kfac_laplace.curvature.linalg.spectrum import Spectrum, eigenbasis, eigenvalues
from kfac_laplace.curvature.rows.layout import Layout


@dataclass(frozen=True)
class LowRankBlock(Block):
    """H ≈ RᵀR with 0 ≤ H − RᵀR, whose trace is known.

    Args:
        rows: R (k, p), k ≤ rank and k ≤ p, in parameter order and in the precision of gradients.
        dropped: trace of H − RᵀR, an upper bound of its largest eigenvalue, shape (), float64.
        rank: how many rows there may be.
    """

    rows: Tensor
    dropped: Tensor
    rank: int = LowRank.rank
    kind: ClassVar[str] = "lowrank"
    additive: ClassVar[bool] = False

    @property
    def factors(self) -> Tensor:
        """R."""
        return self.rows

    @property
    def share(self) -> float:
        """Share of the trace of H that is held, from 0 to 1; 1 where there is nothing to hold."""
        held, whole = self.held
        return held / whole if whole > 0 else 1.0

    @property
    def held(self) -> tuple[float, float]:
        """The trace of RᵀR, and that of H."""
        held = float(in_double(self.rows).square().sum())
        return held, held + float(self.dropped)

    def dense(self) -> Tensor:
        """RᵀR (p, p), float64."""
        rows = in_double(self.rows)
        return rows.mT @ rows

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenvalues (1, 1, p) by inner products of rows; the basis only when asked for."""
        with torch.inference_mode(False):
            rows = in_double(self.rows)
            k, p = rows.shape
            zeros = rows.new_zeros(1, p - k)
            found = eigenvalues((rows @ rows.mT)[None], self.name) if k else rows.new_zeros(1, 0)
            return Spectrum(torch.cat([zeros, found], -1)[:, None], self._bases)

    def _bases(self) -> tuple[Tensor, Tensor]:
        """A single one, and the eigenvectors of RᵀR."""
        matrix = self.dense()[None]
        return torch.ones_like(matrix[:, :1, :1]), eigenbasis(matrix, self.name)

    def tensors(self) -> dict[str, Tensor]:
        """Rows and trace by field name."""
        return {"rows": self.rows, "dropped": self.dropped}

    @classmethod
    def from_tensors(
        cls, layout: Layout, tensors: Mapping[str, Tensor], rank: int = LowRank.rank
    ) -> Self:
        """Rebuild a block from `tensors()` and its rank."""
        return cls(layout, tensors["rows"], tensors["dropped"], rank)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The block of the same parameters and rank with other rows."""
        return self.from_tensors(self.layout, tensors, self.rank)

    def __add__(self, other: Self) -> Self:
        """The leading directions of the two data sets together."""
        return self.absorb(other)

    def absorb(self, other: Self) -> Self:
        """The same: neither's own tensors change."""
        limit = min(self.rank, self.layout.size)
        rows, lost = leading([other.rows, self.rows], limit, self.dropped.dtype)
        return replace(self, rows=rows, dropped=self.dropped + other.dropped + lost)

    def scaled(self, weight: float) -> Self:
        """The block times a weight ≥ 0, and so is what was dropped."""
        return replace(self, rows=weight**0.5 * self.rows, dropped=weight * self.dropped)

    def zero(self) -> Self:
        """The block of no data: no rows."""
        return replace(self, rows=self.rows[:0], dropped=torch.zeros_like(self.dropped))


class LowRankAccumulator(WholeGradients):
    """Leading directions of Σ_v Σ_n g gᵀ over all groups together, an incremental SVD [BRAND06].

    Twice as many rows as are kept are waited for, beside those of one vector: an eigenproblem of
    their inner products then costs least for each row.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        layout: Layout,
        passed: ForwardPass,
        dtype: SumDtype,
        rank: int,
    ):
        super().__init__(groups, passed)
        self._layout, self._rank, self._limit = layout, rank, min(rank, layout.size)
        like = accumulable(passed.params[layout.params[0]].detach().new_empty(0, layout.size))
        self._held, self._dtype = [like], dtype.sums(like)
        self._dropped = like.new_zeros((), dtype=self._dtype)

    def _add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Take whole gradients as rows."""
        flat = flat_gradients(self._passed, self._layout, (rows, generic))  # (v, n, p)
        if flat is None:
            return
        self._held.append(flat.flatten(0, 1))
        if sum(map(len, self._held)) > 2 * self._limit:
            self._compress()

    def _compress(self) -> None:
        """Keep the leading directions of the rows so far."""
        rows, lost = leading(self._held, self._limit, self._dtype)
        self._held, self._dropped = [rows], self._dropped + lost

    def block(self) -> LowRankBlock:
        """The rows, and the trace of what was dropped."""
        self._compress()
        return LowRankBlock(self._layout, self._held[0], self._dropped, self._rank)
