"""From a Gaussian over outputs to class probabilities: probit, Laplace bridge, and draws.

All take means (..., c) and covariances (..., c, c).
"""

import math

import torch
from torch import Generator, Tensor

LINKS = ("probit", "bridge", "mc")


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Outputs mean/√(1 + π/8 · variance), whose probabilities are averages [MacKay 1992]."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return mean / (1 + math.pi / 8 * variance).sqrt()


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of the Dirichlet that matches the Gaussian on the simplex [Hobbhahn et al. 2022].

    The Gaussian is first conditioned on logits that sum to zero, since softmax does not see their
    common shift.

    Returns:
        Probabilities (..., c).
    """
    ones = covariance.sum(-1)  # Σ 1, shape (..., c)
    total = ones.sum(-1, keepdim=True)  # 1ᵀ Σ 1
    # A degenerate Gaussian (κ = 0) has nothing to condition on.
    gain = torch.where(total > 0, ones / total.where(total > 0, torch.ones_like(total)), 0.0)
    mean = mean - gain * mean.sum(-1, keepdim=True)
    variance = (covariance - gain[..., :, None] * ones[..., None, :]).diagonal(dim1=-2, dim2=-1)
    c = mean.shape[-1]
    log_scale = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(c)
    certain = (variance <= 0).any(-1, keepdim=True)  # κ = 0: the probabilities at the mean
    alpha = (1 - 2 / c + log_scale.exp()) / variance.where(~certain, 1.0)
    spread = alpha.sum(-1, keepdim=True)
    certain = certain | ~torch.isfinite(spread)
    return torch.where(certain, mean.softmax(-1), alpha / spread)


def sample_outputs(mean: Tensor, covariance: Tensor, n: int, generator: Generator) -> Tensor:
    """Draws (n, *mean.shape) from N(mean, covariance), also where the covariance is singular."""
    values, basis = torch.linalg.eigh(covariance)
    root = basis * values.clamp_min(0).sqrt()[..., None, :]
    noise = torch.randn(
        n, *mean.shape, dtype=mean.dtype, generator=generator, device=generator.device
    ).to(mean.device)
    return mean + (root @ noise[..., None])[..., 0]
