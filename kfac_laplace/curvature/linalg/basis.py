"""Orthonormal bases: a matrix of columns, or a few columns and a reflection that completes them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Completed:
    """Orthonormal bases Q (b, d, d) of which k columns are given, in memory for d × k numbers.

    Q = (I − U G Uᵀ) · diag(T, I) with the block reflector of [SP88], that takes the first k unit
    vectors to V Tᵀ, for columns V whose first k rows have the polar decomposition −P T.

    Args:
        reflected: U (b, d, k).
        middle: G (b, k, k).
        turn: T (b, k, k), orthogonal.
    """

    reflected: Tensor
    middle: Tensor
    turn: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> Self:
        """The bases whose first columns are those of (b, d, k), which are orthonormal."""
        k = columns.shape[-1]
        left, scale, right = torch.linalg.svd(columns[:, :k])  # (b, k, k) each but the second
        turn = -left @ right
        reflected = columns @ turn.mT
        reflected.diagonal(dim1=-2, dim2=-1).sub_(1)
        # Singular values are cosines, from 0 to 1: what is divided by is far from zero.
        middle = (left / (1 + scale)[:, None]) @ left.mT
        return cls(reflected, middle, turn)

    def to(self, target: torch.dtype | torch.device) -> "Completed":
        """In another precision, or on another device."""
        return Completed(*(part.to(target) for part in (self.reflected, self.middle, self.turn)))

    def turned(self, rows: Tensor) -> Tensor:
        """Rows (..., b, m, d) times Q."""
        found, k = self._reflected(rows), self.turn.shape[-1]
        return torch.cat([found[..., :k] @ self.turn, found[..., k:]], -1)

    def turned_back(self, rows: Tensor) -> Tensor:
        """Rows (..., b, m, d) times Qᵀ."""
        k = self.turn.shape[-1]
        return self._reflected(torch.cat([rows[..., :k] @ self.turn.mT, rows[..., k:]], -1))

    def _reflected(self, rows: Tensor) -> Tensor:
        return rows - ((rows @ self.reflected) @ self.middle) @ self.reflected.mT


#: Columns (b, d, d), or as above.
Basis = Tensor | Completed


def turned(rows: Tensor, basis: Basis) -> Tensor:
    """Rows (..., b, m, d) times the basis."""
    return rows @ basis if isinstance(basis, Tensor) else basis.turned(rows)


def turned_back(rows: Tensor, basis: Basis) -> Tensor:
    """Rows (..., b, m, d) times the transpose of the basis."""
    return rows @ basis.mT if isinstance(basis, Tensor) else basis.turned_back(rows)


def columns_turned(matrices: Tensor, basis: Basis) -> Tensor:
    """The transpose of the basis times matrices (..., b, d, m)."""
    if isinstance(basis, Tensor):
        return basis.mT @ matrices
    return basis.turned(matrices.mT).mT


def columns_turned_back(matrices: Tensor, basis: Basis) -> Tensor:
    """The basis times matrices (..., b, d, m)."""
    if isinstance(basis, Tensor):
        return basis @ matrices
    return basis.turned_back(matrices.mT).mT


def multiplications(basis: Basis) -> int:
    """How many it takes to turn a row."""
    if isinstance(basis, Tensor):
        return basis.shape[-2] * basis.shape[-1]
    d, k = basis.reflected.shape[-2:]
    return 2 * k * (d + k)
