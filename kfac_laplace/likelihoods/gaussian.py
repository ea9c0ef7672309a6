"""Regression with Gaussian noise."""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from kfac_laplace.likelihoods.checks import check_same_layout, elementwise_target
from kfac_laplace.likelihoods.likelihood import Likelihood


class Gaussian(Likelihood):
    """N(y | f, σ² I): Λ = I at σ = 1."""

    has_noise = True

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis; every output has the same curvature, so none is special."""
        check_same_layout(output, target)
        return -1

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

    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """−RSS/(2σ²) − ½ count log 2πσ²."""
        return -0.5 * statistic / sigma**2 - 0.5 * count * (2 * math.pi * sigma**2).log()

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual f − y."""
        return f - y

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """The c unit vectors."""
        for c in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., c] = 1
            yield column

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Add standard normal noise to f."""
        noise = torch.randn(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        return f + noise.to(f.device)

    def hessian(self, f: Tensor) -> Tensor:
        """The identity."""
        return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device).expand(*f.shape, -1)

    def precision(self, sigma: Tensor) -> Tensor:
        """1/σ²."""
        return sigma**-2
