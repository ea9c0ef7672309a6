"""The predictive distribution of each number on its own: intervals, ranks, CRPS."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from kfac_laplace.likelihoods import Latent, Likelihood
from kfac_laplace.likelihoods.predictive import RowPredictive

#: Draws for what has no closed form: with 999 the ends of 50, 90 and 95 % intervals are draws.
DRAWS = 999


class Marginals(Protocol):
    """Distributions of numbers (n, t, c), each on its own."""

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of a probability."""

    def rank(self, y: Tensor) -> Tensor:
        """Share of the distribution below y, ties by half."""

    def crps(self, y: Tensor) -> Tensor:
        """∫ (F(x) − 1[x ≥ y])² dx, in the units of y."""


@dataclass(frozen=True)
class Normals:
    """Normal distributions.

    Args:
        mean: shape (n, t, c).
        deviation: likewise.
    """

    mean: Tensor
    deviation: Tensor

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """Mean ± quantile · deviation."""
        quantile = (
            math.sqrt(2)
            * torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu")).item()
        )
        return self.mean - quantile * self.deviation, self.mean + quantile * self.deviation

    def rank(self, y: Tensor) -> Tensor:
        """Φ(z)."""
        return torch.special.ndtr((y - self.mean) / self.deviation)

    def crps(self, y: Tensor) -> Tensor:
        """s [z (2 Φ(z) − 1) + 2 φ(z) − 1/√π] [Gneiting 2007]."""
        z = (y - self.mean) / self.deviation
        density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
        parts = z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi)
        return self.deviation * parts


@dataclass(frozen=True)
class Drawn:
    """Distributions by draws from them.

    Args:
        ordered: draws (s, n, t, c), ascending.
    """

    ordered: Tensor

    def interval(self, level: float) -> tuple[Tensor, Tensor]:
        """The draws between which a new one lies with this probability."""
        s = len(self.ordered)
        outside = min(s // 2, max(0, round((s + 1) * (1 - level) / 2) - 1))
        return self.ordered[outside], self.ordered[s - 1 - outside]

    def rank(self, y: Tensor) -> Tensor:
        """Share of draws below, and half of those at y."""
        below, up_to = ((self.ordered < y).double(), (self.ordered <= y).double())
        return 0.5 * (below.mean(0) + up_to.mean(0))

    def crps(self, y: Tensor) -> Tensor:
        """E |x − y| − ½ E |x − x'| over pairs of different draws, without bias."""
        s = len(self.ordered)
        places = torch.arange(1, s + 1).to(self.ordered).reshape(-1, 1, 1, 1)
        pairs = ((2 * places - s - 1) * self.ordered).sum(0) / (s * (s - 1))
        return (self.ordered - y).abs().mean(0) - pairs


def marginals(
    likelihood: Likelihood, found: RowPredictive, latent: Latent, sigma: Tensor
) -> Marginals:
    """The distribution of each number that is predicted, in closed form or by draws.

    Args:
        likelihood: p(y | f).
        found: the predictive distribution.
        latent: the Gaussian over outputs that it is made of.
        sigma: the noise.
    """
    if likelihood.has_gaussian_noise:
        normal = found.distribution(lambda aligned: aligned)
        shape = latent.mean.shape
        return Normals(normal.mean.reshape(shape), normal.variance.sqrt().reshape(shape))
    f = Latent(latent.mean, latent.covariance, seed=latent.seed, n_samples=DRAWS).draws
    generator = Generator().manual_seed((latent.seed + 1) % 2**63)
    y = likelihood.predictive_draws(f.flatten(0, 1), sigma, generator)
    return Drawn(y.double().unflatten(0, f.shape[:2]).sort(0).values)
