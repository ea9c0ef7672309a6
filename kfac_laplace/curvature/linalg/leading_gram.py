"""Gram matrices of wide rows by their leading directions and the mean of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.linalg.basis import Basis, Completed
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.linalg.gram import Gram, check_width
from kfac_laplace.curvature.linalg.leading import leading
from kfac_laplace.curvature.linalg.packed import pack
from kfac_laplace.curvature.linalg.spectrum import eigenbasis, eigenvalues

#: What messages name: sums do not know whose they are.
WHERE = "a wide factor"


def is_wide(i: int, rank: int) -> bool:
    """Whether rows of so many entries are kept by so many directions: where that halves them."""
    return i > 2 * rank


@dataclass(frozen=True)
class LeadingGram(Gram):
    """RᵀR + ρ (I − Π) for each of b stacks: ρ spreads what was left out over all other directions.

    Π projects on the rows of R. The trace is that of all rows, and so are the largest eigenvalues
    and their directions, up to what was left out before they were found [BRAND06].

    Args:
        packed: none, (b, 0, 0).
        rows: R (b, k, i), k ≤ rank.
        rest: trace (b,) of what was left out, float64.
        rank: how many rows there may be.
    """

    rest: Tensor
    rank: int

    @classmethod
    def of_rows(cls, rows: Tensor, rest: Tensor, rank: int) -> Self:
        """That of rows and a rest."""
        return cls(rest.new_empty(len(rows), 0, 0, device=rows.device), rows, rest, rank)

    @classmethod
    def nearest(cls, matrices: Tensor, rank: int) -> Self:
        """The nearest to symmetric matrices (b, i, i) with their traces."""
        values, vectors = torch.linalg.eigh(matrices)  # ascending
        rows = values[:, -rank:].clamp_min(0).sqrt()[..., None] * vectors[..., -rank:].mT
        return cls.of_rows(rows, values[:, :-rank].clamp_min(0).sum(-1).double(), rank)

    @classmethod
    def beside(cls, parts: Sequence["LeadingGram"]) -> Self:
        """Stacks one after another; of few rows, rows of zeros are added."""
        most = max(part.rows.shape[1] for part in parts)
        rows = [torch.cat([p.rows, _zeros(p.rows, most - p.rows.shape[1])], 1) for p in parts]
        return cls.of_rows(torch.cat(rows), torch.cat([p.rest for p in parts]), parts[0].rank)

    def stacks(self) -> list[Self]:
        """Each stack alone."""
        pairs = zip(self.rows.split(1), self.rest.split(1), strict=True)
        return [self.of_rows(rows, rest, self.rank) for rows, rest in pairs]

    def __add__(self, other: Gram) -> "LeadingGram":
        """The sum over the rows of both."""
        return self.absorb(other)

    def to(self, device: torch.device) -> "LeadingGram":
        """The same with its rows on a device."""
        return self.of_rows(self.rows.to(device), self.rest, self.rank)

    def clone(self) -> "LeadingGram":
        """The same in tensors of its own."""
        return self.of_rows(self.rows.clone(), self.rest.clone(), self.rank)

    def absorb(self, other: Gram) -> "LeadingGram":
        """The same: neither's own tensors change."""
        assert isinstance(other, LeadingGram)
        device = self.rest.device  # where to compute, wherever rows lie
        pairs = zip(other.rows.to(device), self.rows.to(device), strict=True)
        found = [leading(pair, self.rank, self.rest.dtype, WHERE) for pair in pairs]
        rows, lost = (torch.stack(parts) for parts in zip(*found, strict=True))
        rest = self.rest + other.rest + lost
        return self.of_rows(rows.to(self.rows.device), rest, self.rank)

    def as_sums(self) -> "LeadingGram":
        """As it is."""
        return self

    def compact(self) -> "LeadingGram":
        """As it is."""
        return self

    def matrices(self) -> Tensor:
        """The matrices (b, i, i), float64."""
        rows, directions = self.rows.double(), self._factored[0]
        eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        others = eye - directions @ directions.mT
        return rows.mT @ rows + self._spread[:, None, None] * others

    def summed(self) -> Tensor:
        """The matrices, packed."""
        return pack(self.matrices())

    def traces(self) -> Tensor:
        """Traces (b,)."""
        return self.rows.to(self.rest.dtype).square().sum((1, 2)).to(self.rest.device) + self.rest

    def eigenvalues(self, where: str) -> Tensor:
        """Of the rows, ascending, then ρ for all other directions: (b, i), float64."""
        rows = self.rows.double()
        b, k, i = rows.shape
        found = eigenvalues(rows @ rows.mT, where) if k else rows.new_zeros(b, 0)
        return torch.cat([found, self._spread[:, None].expand(-1, i - k)], -1)

    def basis(self, where: str) -> Basis:
        """Eigenvectors in this order."""
        columns, triangle = self._factored
        return Completed.of(columns @ eigenbasis(triangle @ triangle.mT, where))

    @property
    def _spread(self) -> Tensor:
        """ρ (b,)."""
        k, i = self.rows.shape[1:]
        return self.rest.double() / (i - k)

    @cached_property
    def _factored(self) -> tuple[Tensor, Tensor]:
        """Rᵀ as orthonormal columns (b, i, k) times triangles (b, k, k): also where rows depend."""
        columns, triangle = torch.linalg.qr(self.rows.double().mT)
        return columns, triangle


def _zeros(rows: Tensor, count: int) -> Tensor:
    return rows.new_zeros(len(rows), count, rows.shape[-1])


class LeadingSum:
    """Adds rows up to a `LeadingGram`, as `GramSum` does to a `Gram`.

    Twice as many rows as are kept are waited for: an eigenproblem of their inner products then
    costs least for each row.

    Args:
        b: number of stacks.
        i: width of the rows.
        like: a tensor on the device and in the precision of the rows.
        dtype: the precision of products.
        rank: how many directions are kept.
    """

    def __init__(self, b: int, i: int, like: Tensor, dtype: SumDtype, rank: int):
        rows = accumulable(like.new_empty(0)).new_empty(0, i)
        self._rank, self._dtype = rank, dtype.sums(like)
        self._held = [[rows] for _ in range(b)]
        self._rest = rows.new_zeros(b, dtype=torch.float64)

    def __len__(self) -> int:
        """Number of stacks."""
        return len(self._held)

    def foresee(self, rows: int) -> None:
        """Nothing depends on how many rows will come."""

    def add(self, rows: Tensor, start: int = 0) -> None:
        """Add rows (b', *lead, i) to the stacks from `start` on."""
        if not rows.numel():
            return
        check_width(rows, self._held[0][0].shape[-1])
        for stack, own in enumerate(rows, start):
            for piece in own.reshape(-1, own.shape[-1]).split(2 * self._rank):
                # A copy: what is waited for must not hold, or change with, a larger tensor.
                self._held[stack].append(piece.clone())
                if sum(map(len, self._held[stack])) > 2 * self._rank:
                    self._compress(stack)

    def _compress(self, stack: int) -> None:
        """Keep the leading directions of a stack's rows so far."""
        rows, lost = leading(self._held[stack], self._rank, self._dtype, WHERE)
        self._held[stack] = [rows]
        self._rest[stack] += lost

    def gram(self) -> LeadingGram:
        """The sum."""
        for stack in range(len(self)):
            self._compress(stack)
        each = [
            LeadingGram.of_rows(held[0][None], rest[None], self._rank)
            for held, rest in zip(self._held, self._rest, strict=True)
        ]
        return LeadingGram.beside(each)
