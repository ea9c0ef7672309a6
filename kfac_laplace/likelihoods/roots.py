"""Roots of a curvature Λ: columns S_k with Σ_k S_k S_kᵀ = Λ."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue


def diagonal_roots(deviations: Tensor) -> Iterator[Tensor]:
    """The c columns of diag(d), for deviations d (n, t, c): roots of Λ = diag(d²)."""
    for c in range(deviations.shape[-1]):
        column = torch.zeros_like(deviations)
        column[..., c] = deviations[..., c]
        yield column


def eigen_roots(hessian: Tensor) -> Iterator[Tensor]:
    """Eigenvectors times the roots of their eigenvalues, the largest first.

    Args:
        hessian: Λ of each row, shape (n, t, c, c).

    Raises:
        InvalidValue: eigenvalues below zero by more than rounding.
    """
    values, vectors = torch.linalg.eigh(hessian)
    noise = values.abs().amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(values.dtype).eps
    if bool((values < -10 * noise).any()):
        raise InvalidValue(
            "not positive semi-definite",
            where="Likelihood.hessian",
            got=f"an eigenvalue of {float(values.min()):.3g}",
            remedy="Return the Fisher information of y in f, E[score scoreᵀ]",
        )
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    for k in reversed(range(roots.shape[-1])):
        yield roots[..., k]
