"""From a Gaussian over outputs to class probabilities: probit, Laplace bridge, and draws.

All take means (..., c) and covariances (..., c, c).
"""

import math
from typing import Literal, get_args

import torch
from torch import Generator, Tensor
from torch.quasirandom import SobolEngine

from kfac_laplace.likelihoods.symmetric_root import symmetric_root

#: "auto" is resolved by the posterior: which of the others, or `averaged`, depends on its scale.
Link = Literal["auto", "mode", "probit", "centred", "bridge", "mc"]
LINKS: tuple[Link, ...] = get_args(Link)

#: Variance of a centred logit up to which `averaged` takes the closed form. On Gaussians of 2, 3
#: and 10 logits with random means and covariances the centred probit is off the integral by 0.006
#: on average at 0.1, 0.015 at 0.3, 0.04 at 1 (as a hundred plain draws are), 0.07 at 3, 0.12 at
#: 10; at the worst by 0.02, 0.06, 0.12, 0.24 and 0.55. On held-out data of 48 small networks limits
#: of 1 and 4 came out alike, 0.1 and none a little worse in NLL.
MODERATE = 1.0

#: Scrambled points may round to 0 and 1.
EDGE = 2.0**-30

#: Entries that draws of outputs hold at a time.
ENTRIES = 2**22


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Outputs mean/√(1 + π/8 · variance), whose probabilities are averages [MacKay 1992]."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return mean / (1 + math.pi / 8 * variance).sqrt()


def centred(mean: Tensor, covariance: Tensor) -> Tensor:
    """Outputs Cf/√(1 + π/8 · diag(C Σ C)), C = I − 11ᵀ/c: softmax does not see a common shift.

    Of a single output it is `probit`. Close to the integral at small variances only: two logits are
    given a quarter of the variance of their difference, and where a few directions have large
    variances the averages come out too sure.
    """
    return probit(*_without_shift(mean, covariance))


def averaged(mean: Tensor, covariance: Tensor, n: int, seed: int) -> Tensor:
    """Averages of softmax(f): the centred probit for moderate variances, points for what is beyond.

    Where the largest variance v of a centred logit is beyond `MODERATE` = m, points stand for a
    share 1 − m/v of the covariance, and the closed form for the rest. Row by row, with the same
    points for all: what is said of a row does not depend on others.

    Args:
        mean: shape (..., c).
        covariance: shape (..., c, c).
        n: number of points.
        seed: what they are scrambled by.

    Returns:
        Probabilities (..., c).
    """
    f, spread = _without_shift(mean.double(), covariance.double())
    probs = probit(f, spread).softmax(-1)
    large = spread.diagonal(dim1=-2, dim2=-1).amax(-1) > MODERATE
    if bool(large.any()):
        z = normal_points(n, f.shape[-1], seed).to(f.device)
        step = max(1, ENTRIES // z.numel())
        rows = zip(f[large].split(step), spread[large].split(step), strict=True)
        probs = probs.index_put((large,), torch.cat([_over_points(*row, z) for row in rows]))
    return probs.to(mean.dtype)


def normal_points(n: int, c: int, seed: int) -> Tensor:
    """Scrambled Sobol points of N(0, I), float64, shape (n, c); draws where c is beyond Sobol's."""
    if c > SobolEngine.MAXDIM:
        generator = Generator().manual_seed(seed)
        return torch.randn(n, c, dtype=torch.float64, generator=generator, device="cpu")
    uniform = SobolEngine(c, scramble=True, seed=seed).draw(n, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(EDGE, 1 - EDGE))


def _without_shift(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of C f; a single output stays as it is."""
    if mean.shape[-1] == 1:
        return mean, covariance
    by_row = covariance - covariance.mean(-1, keepdim=True)
    return mean - mean.mean(-1, keepdim=True), by_row - by_row.mean(-2, keepdim=True)


def _over_points(mean: Tensor, covariance: Tensor, z: Tensor) -> Tensor:
    """Averages over points z (s, c), for rows (r, c) and (r, c, c) of large variances."""
    root = symmetric_root(covariance)
    variance = covariance.diagonal(dim1=-2, dim2=-1)  # (r, c)
    rest = MODERATE / variance.amax(-1)  # (r,)
    f = mean[:, None] + (1 - rest).sqrt()[:, None, None] * (z @ root)  # (r, s, c)
    return (f / (1 + math.pi / 8 * rest[:, None] * variance).sqrt()[:, None]).softmax(-1).mean(1)


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
    # κ = 0, or logits that their sum determines, as those along one direction: the probabilities at
    # the mean. Of these variances rounding is left, whose ratios mean nothing.
    largest = covariance.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    rounding = 8 * c * torch.finfo(covariance.dtype).eps * largest
    certain = (variance <= rounding).any(-1, keepdim=True)
    alpha = (1 - 2 / c + log_scale.exp()) / variance.where(~certain, 1.0)
    spread = alpha.sum(-1, keepdim=True)
    certain = certain | ~torch.isfinite(spread)
    return torch.where(certain, mean.softmax(-1), alpha / spread)


def sample_outputs(mean: Tensor, covariance: Tensor, n: int, generator: Generator) -> Tensor:
    """Draws (n, *mean.shape) from N(mean, covariance), also where the covariance is singular."""
    root = symmetric_root(covariance)
    noise = torch.randn(
        n, *mean.shape, dtype=mean.dtype, generator=generator, device=generator.device
    ).to(mean.device)
    return mean + (root @ noise[..., None])[..., 0]
