"""Regression with Gaussian noise."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, Normal

from kfac_laplace.devices import sent
from kfac_laplace.likelihoods.checks import check_same_layout, elementwise_target
from kfac_laplace.likelihoods.latent import Latent
from kfac_laplace.likelihoods.moments import Moments
from kfac_laplace.likelihoods.predictive import NormalPredictive
from kfac_laplace.likelihoods.roots import diagonal_roots

#: What knows nothing is so many times as wide as the targets' spread. The spread itself is no
#: measure: where noise alone is to be learned, exact predictions of points left out are worse.
VAGUE = 10.0


class Gaussian(Moments):
    """N(y | f, σ² I): Λ = I at σ = 1."""

    has_noise = True
    has_gaussian_noise = True

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """N(f, σ² I)."""
        return Independent(Normal(f, sigma), 1)

    def check_axis(self, shape: Sequence[int], target: Tensor, axis: int) -> None:
        """One target for each output, whatever the axis."""
        check_same_layout(shape, target)

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Values (n, t, c); no broadcasting, which would regress on the wrong pairs."""
        return elementwise_target(target, f)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """−½ Σ (y − f)²/σ² − ½ t c log 2πσ², shape (n,)."""
        squares = (y - f).square().flatten(1).sum(1)
        count = f[0].numel()
        return -0.5 * squares / sigma**2 - 0.5 * count * (2 * math.pi * sigma**2).log()

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual sum of squares."""
        return (y.double() - f.double()).square().sum()

    def log_likelihood(self, statistic: Tensor, count: float, sigma: Tensor) -> Tensor:
        """−RSS/(2σ²) − ½ count log 2πσ²."""
        return -0.5 * statistic / sigma**2 - 0.5 * count * (2 * math.pi * sigma**2).log()

    def target_spread(self, sums: Tensor) -> float:
        """Root mean square of the targets' distances from the mean of their output."""
        if not sums.numel():
            return math.nan
        count, _, inside = sums
        return math.sqrt(float(inside.sum() / count.sum()))

    def uninformed(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor] | None:
        """The targets' mean by output, `VAGUE` times as wide as their spread; None at spread 0."""
        spread = self.target_spread(self.target_sums(y, f))
        return (y.to(f).mean((0, 1)), f.new_tensor(VAGUE * spread)) if spread else None

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """That of N(ȳ, s²) at the mean of each output and the spread s of all."""
        if not sums.numel():
            return math.nan
        spread, count = self.target_spread(sums), float(sums[0].sum())
        return -0.5 * count * (1 + math.log(2 * math.pi * spread**2)) if spread else math.inf

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual f − y."""
        return f - y

    def score_with_noise(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """(f − y)/σ²."""
        return self.precision(sigma) * self.score(f, y)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """The c unit vectors."""
        return diagonal_roots(torch.ones_like(f))

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Add standard normal noise to f."""
        return f + _noise(f, generator)

    def hessian(self, f: Tensor) -> Tensor:
        """The identity."""
        return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device).expand(*f.shape, -1)

    def precision(self, sigma: Tensor) -> Tensor:
        """1/σ²."""
        return sigma**-2

    def predict(self, latent: Latent, sigma: Tensor, link: str) -> NormalPredictive:
        """Gaussian, in closed form."""
        return NormalPredictive(latent, sigma)

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """y = f + σ ε."""
        return f + sigma.to(f) * _noise(f, generator)


def _noise(f: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise, shaped as f."""
    noise = torch.randn(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
    return sent(noise, f.device)
