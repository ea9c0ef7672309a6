"""Symmetric roots of covariances, with a derivative also where eigenvalues are equal or zero."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def symmetric_root(covariance: Tensor) -> Tensor:
    """S = Sᵀ with S S = Σ, shape (..., c, c): it does not depend on the choice of eigenvectors.

    Directions without variance have none: the root of rounding would be 1e-8. The derivative solves
    S dS + dS S = dΣ, and is right as long as the rank stays.

    Args:
        covariance: Σ (..., c, c), positive semi-definite up to rounding.
    """
    root: Tensor = _SymmetricRoot.apply(covariance)  # type: ignore[no-untyped-call]  # torch's
    return root


class _SymmetricRoot(torch.autograd.Function):
    """In an eigenbasis dS_ij = dΣ_ij/(s_i + s_j), where autograd divides by s_i² − s_j²."""

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> Tensor:
        values, basis = torch.linalg.eigh(covariance)
        rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
        scales = values.where(values > rounding.clamp_min(0), 0.0).sqrt()
        ctx.save_for_backward(scales, basis)
        return (basis * scales[..., None, :]) @ basis.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        scales, basis = ctx.saved_tensors
        sums = scales[..., :, None] + scales[..., None, :]
        inside = basis.mT @ ((gradient + gradient.mT) / 2) @ basis
        solved = torch.where(sums > 0, inside / sums.where(sums > 0, 1.0), 0.0)
        return basis @ solved @ basis.mT
