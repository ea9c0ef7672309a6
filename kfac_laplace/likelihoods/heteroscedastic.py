"""Regression whose noise depends on the input: two outputs for each target."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.types import _size
from typing_extensions import Self

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.moments import Moments


class Heteroscedastic(Moments):
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
        return Independent(_Natural.of(*f.chunk(2, -1)), 1)

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Values (n, t, C).

        Raises:
            InvalidValue: an odd number of outputs, moments beyond the precision's range, or other
                targets than one for two outputs.
        """
        if f.shape[-1] % 2:
            raise InvalidValue(
                "each target needs two outputs",
                where="model output",
                got=f"{f.shape[-1]} outputs",
                remedy="Return natural parameters: a for each target, then s for each",
            )
        _Natural.of(*f.detach().chunk(2, -1)).check_moments()
        return super().align_target(target, f)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ −½ (e^(s/2) y − e^(−s/2) a)² + ½ s − ½ log 2π, shape (n,)."""
        a, s = f.chunk(2, -1)
        residual = (s / 2).exp() * y - (-s / 2).exp() * a
        terms = 0.5 * (s - residual.square() - math.log(2 * math.pi))
        return terms.flatten(1).sum(1)

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """That of N(ȳ, s²) with a spread for each target."""
        if not sums.numel():
            return math.nan
        count, _, inside = sums
        return float(-0.5 * (count * (1 + (2 * math.pi * inside / count).log())).sum())

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


class _Natural(Normal):
    """N(a e^−s, e^−s) with a density that holds where its moments under- or overflow."""

    natural: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, a: Tensor, s: Tensor) -> Self:
        made = cls(a * (-s).exp(), (-s / 2).exp(), validate_args=False)
        made.natural = (a, s)
        return made

    def check_moments(self) -> None:
        """Raise `InvalidValue` where the mean or the deviation is no number above zero."""
        fits = torch.isfinite(self.loc) & torch.isfinite(self.scale) & (self.scale > 0)
        if not bool(fits.all()):
            s = self.natural[1]
            raise InvalidValue(
                "a mean a e^−s or deviation e^(−s/2) is beyond the range of its precision",
                where="model output",
                got=f"s from {float(s.min()):.4g} to {float(s.max()):.4g} in {s.dtype}",
                remedy="Standardise the targets: s is the logarithm of a precision. Where outputs "
                "are samples, raise the prior precision",
            )

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 # as torch has it
        self.check_moments()
        drawn: Tensor = super().sample(sample_shape)  # type: ignore[no-untyped-call]
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        a, s = self.natural
        residual = (s / 2).exp() * value - (-s / 2).exp() * a
        return 0.5 * (s - residual.square() - math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        return 0.5 * (1 + math.log(2 * math.pi) - self.natural[1])

    def expand(self, batch_shape: _size, _instance: Any = None) -> "_Natural":
        made: _Natural = super().expand(batch_shape, _instance)  # type: ignore[no-untyped-call]
        a, s = self.natural
        made.natural = (a.expand(batch_shape), s.expand(batch_shape))
        return made
