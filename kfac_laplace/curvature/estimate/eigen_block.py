"""The block of EKFAC: the eigenbasis of Kronecker factors, with the exact diagonal in it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.estimate.blocks import Bases, Block, own_copy
from kfac_laplace.curvature.linalg.spectrum import Spectrum, eigenvalues_of_diagonal
from kfac_laplace.curvature.rows.layout import Layout


class EigenFactors(NamedTuple):
    """Diagonal (b, o, i) of the block in the bases of B (b, o, o) and A (b, i, i).

    Of a diagonal A the basis is None.
    """

    values: Tensor
    output: Tensor
    input: Tensor | None


@dataclass(frozen=True)
class EigenBlock(Block):
    """The exact diagonal of the GGN in the eigenbasis of Kronecker factors [EKFAC18].

    Args:
        values: that diagonal as matrices (b, o, i).
        output_basis: eigenvectors of B (b, o, o).
        input_basis: of A (b, i, i); (b, 0, 0) where A is diagonal.
    """

    values: Tensor
    output_basis: Tensor
    input_basis: Tensor
    kind: ClassVar[str] = "ekfac"

    @classmethod
    def of(cls, layout: Layout, values: Tensor, bases: Bases) -> Self:
        """The block of a diagonal in bases."""
        left, right = bases
        return cls(layout, values, left, left[:, :0, :0] if right is None else right)

    def bases(self) -> Bases:
        """Eigenvectors of B and A."""
        return self.output_basis, self.input_basis if self.input_basis.shape[-1] else None

    def with_values(self, values: Tensor) -> Self:
        """Another diagonal in the same bases."""
        return replace(self, values=values)

    def __add__(self, other: Self) -> Self:
        """The block of the two data sets together, whose bases must be the same."""
        return self.with_values(self.values + other.values)

    def scaled(self, weight: float) -> Self:
        """The diagonal times a weight."""
        return self.with_values(weight * self.values)

    def zero(self) -> Self:
        """The block of no data, in the same bases."""
        return self.with_values(torch.zeros_like(self.values))

    def sums(self) -> dict[str, Tensor]:
        """The diagonal alone."""
        return {"values": own_copy(self.values)}

    @classmethod
    def from_sums(cls, layout: Layout, sums: Mapping[str, Tensor], bases: Bases | None) -> Self:
        """The block of a diagonal in bases, which all data sets share."""
        assert bases is not None
        return cls.of(layout, sums["values"], bases)

    def absorb(self, other: Self) -> Self:
        """Add another block of the same bases into this one's own sum."""
        self.values.add_(other.values)
        return self

    @property
    def factors(self) -> EigenFactors:
        """The diagonal and the bases."""
        return EigenFactors(self.values, *self.bases())

    def dense(self) -> Tensor:
        """Block-diagonal over b of U diag(values) Uᵀ, U = U_B ⊗ U_A, in parameter order."""
        left, right = self.bases()
        if right is None:
            right = torch.eye(self.values.shape[-1]).to(left).repeat(len(left), 1, 1)
        blocks = []
        for values, u, w in zip(self.values, left, right, strict=True):
            basis = torch.kron(u.contiguous(), w.contiguous())
            blocks.append(basis * values.flatten() @ basis.mT)
        order = self.layout.order.to(left.device)
        return torch.block_diag(*blocks)[order[:, None], order]

    @cached_property
    def spectrum(self) -> Spectrum:
        """The diagonal, and the bases as they are."""
        with torch.inference_mode(False):
            return Spectrum(eigenvalues_of_diagonal(self.values, self.name), self.bases)
