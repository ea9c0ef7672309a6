"""Regression whose noise depends on the input: two outputs for each target."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.likelihood import Likelihood


class Heteroscedastic(Likelihood):
    """Gaussians in natural parameters: p(y | η) ∝ exp(η₁ y + η₂ y²), η₁ = a, η₂ = −½ e^s.

    The 2C outputs of a row are a for each of C targets, then s for each: the precision of y is e^s,
    its mean μ = a e^−s. Outputs of zero are a standard normal distribution. Natural parameters
    train more stably than mean and variance [HET23]. The Fisher information of (a, s) is

        Λ = [[e^−s, −μ], [−μ, μ² e^s + ½]],

    where the exponential for η₂ < 0, rather than a softplus, gives moments in closed form.

    Targets (n, C) are half as wide as the outputs. There is no σ: the network learns the noise.
    """

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """N(a e^−s, e^−s) for each target."""
        a, s = f.chunk(2, -1)
        return Independent(Normal(a * (-s).exp(), (-s / 2).exp()), 1)

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Values (n, t, C).

        Raises:
            InvalidValue: an odd number of outputs, or other targets than one for two outputs.
        """
        if f.shape[-1] % 2:
            raise InvalidValue(
                "each target needs two outputs",
                where="model output",
                got=f"{f.shape[-1]} outputs",
                remedy="Return natural parameters: a for each target, then s for each",
            )
        return super().align_target(target, f)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ −½ (e^(s/2) y − e^(−s/2) a)² + ½ s − ½ log 2π, shape (n,)."""
        a, s = f.chunk(2, -1)
        residual = (s / 2).exp() * y - (-s / 2).exp() * a
        terms = 0.5 * (s - residual.square() - math.log(2 * math.pi))
        return terms.flatten(1).sum(1)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """(μ − y, ½ (e^s (y² − μ²) − 1))."""
        a, s = f.chunk(2, -1)
        mu = a * (-s).exp()
        return torch.cat([mu - y, 0.5 * (s.exp() * (y - mu) * (y + mu) - 1)], -1)

    def hessian(self, f: Tensor) -> Tensor:
        """Λ, one 2 × 2 block for each target, shape (n, t, 2C, 2C)."""
        a, s = f.chunk(2, -1)
        mu = a * (-s).exp()
        first, second = (-s).exp(), mu * a + 0.5
        parts = [torch.diag_embed(part) for part in (first, -mu, second)]
        upper, lower = torch.cat(parts[:2], -1), torch.cat(parts[1:], -1)
        return torch.cat([upper, lower], -2)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Two columns for each target: (e^(−s/2), −μ e^(s/2)) and (0, √½)."""
        a, s = f.chunk(2, -1)
        deviation = (-s / 2).exp()
        width = a.shape[-1]
        for c in range(width):
            column = torch.zeros_like(f)
            column[..., c] = deviation[..., c]
            column[..., width + c] = -(a * deviation)[..., c]
            yield column
        for c in range(width):
            column = torch.zeros_like(f)
            column[..., width + c] = 0.5**0.5
            yield column

    def predictive_mean(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E a e^−s = (m_a − v_as) exp(−m_s + v_ss/2), shape (n, t, C)."""
        a, s = mean.chunk(2, -1)
        width = a.shape[-1]
        across = covariance[..., :width, width:].diagonal(dim1=-2, dim2=-1)
        own = covariance[..., width:, width:].diagonal(dim1=-2, dim2=-1)
        return (a - across) * (own / 2 - s).exp()
