"""Counts: a log link, each output on its own."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Poisson as PoissonDistribution
from torch.types import _size

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.likelihood import Likelihood
from kfac_laplace.likelihoods.roots import diagonal_roots


class Poisson(Likelihood):
    """Counts y = 0, 1, 2, … with log rate f: Λ = diag(e^f).

    Targets are shaped as the output, integers or floats that are whole numbers.
    """

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """Counts of rate e^f."""
        return Independent(_Counts(f.exp()), 1)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ y f − e^f − log y!, shape (n,); also where the rate underflows."""
        return (y * f - f.exp() - torch.lgamma(y + 1)).flatten(1).sum(1)

    target_rows = 3

    def target_sums(self, y: Tensor, f: Tensor) -> Tensor:
        """Number, Σ y and Σ log y! by output, (3, c)."""
        y = y.double().flatten(0, -2)
        return torch.stack([torch.ones_like(y), y, torch.lgamma(y + 1)]).sum(1)

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """That of the mean count of each output."""
        if not sums.numel():
            return math.nan
        count, total, factorials = sums
        return float((torch.special.xlogy(total, total / count) - total - factorials).sum())

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """e^f − y."""
        return f.exp() - y

    def hessian(self, f: Tensor) -> Tensor:
        """diag(e^f)."""
        return torch.diag_embed(f.exp())

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """One column for each output: e^(f/2)."""
        return diagonal_roots((f / 2).exp())

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Counts of rate e^f.

        Raises:
            InvalidValue: a rate beyond the precision's range.
        """
        return _draws(f.exp().to(generator.device), generator).to(f.device)

    def predictive_mean(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E e^f = exp(m + v/2)."""
        return (mean + covariance.diagonal(dim1=-2, dim2=-1) / 2).exp()

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """Counts."""
        return self.sample(f, generator)


#: Beyond this rate a count is a Gaussian rounded to whole numbers, of a skewness below 1e-5:
#: torch's rejections lose their digits on the way to 1e15, and its int64 ends at 9e18.
GAUSSIAN = 1e10
#: Beyond this count the terms of its density cancel.
STABLE = 1e5


class _Counts(PoissonDistribution):
    """Counts whose draws and density hold at any rate: none has the infinite one."""

    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 # as torch has it
        with torch.no_grad():
            return _draws(self.rate.expand(self._extended_shape(sample_shape)), None)

    def log_prob(self, value: Tensor) -> Tensor:
        """−½ log 2πy − y (r − log(1 + r)), r = (λ − y)/y, where y log λ − λ − log y! cancels."""
        direct: Tensor = super().log_prob(value)  # type: ignore[no-untyped-call]
        large = value > STABLE
        if bool(large.any()):
            y = value.where(large, 1.0)
            excess = (self.rate - y) / y
            series = excess.square() * (1 / 2 - excess / 3 + excess.square() / 4)
            spread = torch.where(excess.abs() < 1e-4, series, excess - torch.log1p(excess))
            stirling = 0.5 * (2 * math.pi * y).log() + 1 / (12 * y)
            direct = torch.where(large, -y * spread - stirling, direct)
        return direct.where(torch.isfinite(self.rate), -math.inf)


def _draws(rate: Tensor, generator: Generator | None) -> Tensor:
    """Poisson draws of any finite rate, from a generator or torch's own state.

    Raises:
        InvalidValue: an infinite rate.
    """
    if not bool(torch.isfinite(rate).all()):
        raise InvalidValue(
            "a rate e^f is beyond the range of its precision: no counts can be drawn",
            where="model output",
            got=f"{int((~torch.isfinite(rate)).sum())} of {rate.numel()} infinite in {rate.dtype}",
            remedy="Outputs are logarithms of rates: scale them down, or raise the prior "
            "precision where they are samples",
        )
    large = rate > GAUSSIAN
    drawn = torch.poisson(rate.where(~large, 0.0), generator=generator)
    if not bool(large.any()):
        return drawn
    noise = torch.randn(rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    return torch.where(large, (rate + rate.sqrt() * noise).round(), drawn)
