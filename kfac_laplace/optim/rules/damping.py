"""How damping enters the inverse of B ⊗ A."""

from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.optim.bases import Bases


@dataclass(frozen=True)
class ExactDamping:
    """(B ⊗ A + λ I)⁻¹, exact by eigenvalues.

    Args:
        strength: λ, in units of the curvature of the mean loss.
    """

    strength: float = 1e-3

    def inverse(self, bases: Bases, strength: float | Tensor | None = None) -> Tensor:
        """1 / (μ λᵀ + λ) in the eigenbasis, shape (b, o, i)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FactoredDamping:
    """(B + √λ/π I)⁻¹ ⊗ (A + π √λ I)⁻¹ with π² = (tr A / d_A) / (tr B / d_B), in each block.

    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", section 6.3.

    Args:
        strength: λ, in units of the curvature of the mean loss.
    """

    strength: float = 1e-3

    def inverse(self, bases: Bases, strength: float | Tensor | None = None) -> Tensor:
        """The inverse's eigenvalues, shape (b, o, i)."""
        raise NotImplementedError
