"""How damping enters the inverse of B ⊗ A."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Bases
from kfac_laplace.optim.rules.ranges import check_least_zero


@dataclass(frozen=True)
class Damping(ABC):
    """What makes B ⊗ A invertible.

    Args:
        strength: λ, in units of the curvature of the mean loss. Zero asks for regular factors.
    """

    strength: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        check_least_zero("damping", self.strength)

    def inverse(self, bases: Bases, strength: float | Tensor | None = None) -> Tensor:
        """The damped inverse's eigenvalues, shape (b, o, i).

        Args:
            bases: eigenvalues β of B and α of A.
            strength: λ in place of the value's own, a number or a tensor of shape ().
        """
        strength = self.strength if strength is None else strength
        return self._inverse(bases.left.values, bases.right.values, strength)

    @abstractmethod
    def _inverse(self, left: Tensor, right: Tensor, strength: float | Tensor) -> Tensor:
        """The same by eigenvalues β (b, o) and α (b, i)."""


@dataclass(frozen=True)
class ExactDamping(Damping):
    """(B ⊗ A + λ I)⁻¹, exact by eigenvalues: 1 / (β_o α_i + λ).

    Args:
        strength: λ, in units of the curvature of the mean loss. Zero asks for regular factors.
    """

    def _inverse(self, left: Tensor, right: Tensor, strength: float | Tensor) -> Tensor:
        return (left[:, :, None] * right[:, None, :] + strength).reciprocal_()


@dataclass(frozen=True)
class FactoredDamping(Damping):
    """(B + √λ/π I)⁻¹ ⊗ (A + π √λ I)⁻¹ with π² = (tr A / d_A) / (tr B / d_B), in each block.

    π is 1 where a trace is zero. The eigenvalues are 1 / ((β_o + √λ/π)(α_i + π√λ)).
    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", section 6.3.

    Args:
        strength: λ, in units of the curvature of the mean loss. Zero asks for regular factors.
    """

    def _inverse(self, left: Tensor, right: Tensor, strength: float | Tensor) -> Tensor:
        root = strength.sqrt() if isinstance(strength, Tensor) else strength**0.5
        left_mean, right_mean = left.mean(-1, keepdim=True), right.mean(-1, keepdim=True)
        pi = (right_mean / left_mean).sqrt()  # (b, 1)
        pi = torch.where((left_mean > 0) & (right_mean > 0), pi, torch.ones_like(pi))
        return ((left + root / pi)[:, :, None] * (right + root * pi)[:, None, :]).reciprocal_()
