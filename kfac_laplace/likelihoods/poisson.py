"""Counts: a log link, each output on its own."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent
from torch.distributions import Poisson as PoissonDistribution

from kfac_laplace.likelihoods.likelihood import Likelihood
from kfac_laplace.likelihoods.roots import diagonal_roots


class Poisson(Likelihood):
    """Counts y = 0, 1, 2, … with log rate f: Λ = diag(e^f).

    Targets are shaped as the output, integers or floats that are whole numbers.
    """

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """Counts of rate e^f."""
        return Independent(PoissonDistribution(f.exp()), 1)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ y f − e^f − log y!, shape (n,); also where the rate underflows."""
        return (y * f - f.exp() - torch.lgamma(y + 1)).flatten(1).sum(1)

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
        """Counts of rate e^f."""
        rate = f.exp().to(generator.device)
        return torch.poisson(rate, generator=generator).to(f.device)

    def predictive_mean(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E e^f = exp(m + v/2)."""
        return (mean + covariance.diagonal(dim1=-2, dim2=-1) / 2).exp()

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """Counts."""
        return self.sample(f, generator)
