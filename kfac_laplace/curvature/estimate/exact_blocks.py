"""Blocks that are entries of the exact GGN: its diagonal, or all of a group's."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.estimate.blocks import Bases, Block
from kfac_laplace.curvature.linalg.packed import pack, unpack
from kfac_laplace.curvature.linalg.spectrum import (
    Spectrum,
    eigenbasis,
    eigenvalues,
    eigenvalues_of_diagonal,
)
from kfac_laplace.curvature.rows.layout import Layout


@dataclass(frozen=True)
class DiagonalBlock(Block):
    """The exact diagonal of the GGN.

    Args:
        values: diagonal as matrices (b, o, i).
    """

    values: Tensor
    kind: ClassVar[str] = "diag"

    @property
    def factors(self) -> Tensor:
        """The diagonal (b, o, i)."""
        return self.values

    def dense(self) -> Tensor:
        """The diagonal matrix, in parameter order."""
        order = self.layout.order.to(self.values.device)
        return self.values.flatten()[order].diag()

    @cached_property
    def spectrum(self) -> Spectrum:
        """The diagonal itself."""
        with torch.inference_mode(False):
            return Spectrum(eigenvalues_of_diagonal(self.values, self.name))


@dataclass(frozen=True)
class DenseBlock(Block):
    """The exact GGN of its parameters, off-diagonal entries included.

    Args:
        matrix: shape (p, p), in parameter order.
    """

    matrix: Tensor
    kind: ClassVar[str] = "dense"

    @property
    def factors(self) -> Tensor:
        """The matrix."""
        return self.matrix

    def sums(self) -> dict[str, Tensor]:
        """The matrix, packed."""
        return {"matrix": pack(self.matrix[None])}

    @classmethod
    def from_sums(cls, layout: Layout, sums: Mapping[str, Tensor], bases: Bases | None) -> Self:
        """Rebuild a block from `sums()`."""
        return cls(layout, unpack(sums["matrix"])[0])

    def placed(self, device: torch.device, home: torch.device | None) -> Self:
        """All on the device: blocks for themselves are small, and one of all is used as a whole."""
        return super().placed(device, None)

    def dense(self) -> Tensor:
        """The matrix."""
        return self.matrix

    @cached_property
    def spectrum(self) -> Spectrum:
        """One row of eigenvalues (1, 1, p) with the eigenvectors as right basis."""
        with torch.inference_mode(False):
            values = eigenvalues(self.matrix[None], self.name)
            return Spectrum(values[:, None], self._bases)

    def _bases(self) -> tuple[Tensor, Tensor]:
        """A single one, and the eigenvectors."""
        matrix = self.matrix[None]
        return torch.ones_like(matrix[:, :1, :1]), eigenbasis(matrix, self.name)
