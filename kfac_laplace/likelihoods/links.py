"""From a Gaussian over outputs to class probabilities: probit, Laplace bridge, Monte Carlo.

All take means (n, t, c) and covariances (n, t, c, c) and return probabilities (n, t, c).
"""

import math
from typing import Literal

import torch
from torch import Generator, Tensor

from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import Bernoulli, Categorical, Likelihood

Link = Literal["probit", "bridge", "mc"]
LINKS = ("probit", "bridge", "mc")


def probit(likelihood: Likelihood, mean: Tensor, covariance: Tensor) -> Tensor:
    """Probabilities at mean/√(1 + π/8 · variance) [MacKay 1992]."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return activation(likelihood, mean / (1 + math.pi / 8 * variance).sqrt())


def bridge(likelihood: Likelihood, mean: Tensor, covariance: Tensor) -> Tensor:
    """Mean of the Dirichlet that matches the Gaussian on the simplex [Hobbhahn et al. 2022].

    The Gaussian is first conditioned on logits that sum to zero, since softmax does not see their
    common shift.
    """
    if isinstance(likelihood, Bernoulli):
        raise InvalidValue(
            "the Laplace bridge needs at least two logits",
            where="link_approx",
            got="'bridge' with a binary likelihood",
            remedy="Use 'probit' or 'mc'",
        )
    ones = covariance.sum(-1)  # Σ 1, shape (n, t, c)
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


def activation(likelihood: Likelihood, f: Tensor) -> Tensor:
    """Class probabilities of outputs f (..., c): sigmoid of each logit, or softmax.

    Raises:
        UnsupportedUse: a likelihood without classes.
    """
    if isinstance(likelihood, Bernoulli):
        return f.sigmoid()
    if isinstance(likelihood, Categorical):
        return f.softmax(-1)
    raise UnsupportedUse(
        "this likelihood has no class probabilities",
        where=type(likelihood).__name__,
        remedy="Use functional_samples, or predict(x).mean_f and .covariance, and your own link",
    )
