"""Real targets: their number, mean and spread, which add over data without a digit lost."""

import torch
from torch import Tensor

from kfac_laplace.likelihoods.likelihood import Likelihood


class Moments(Likelihood):
    """A likelihood whose best constant outputs follow from mean and variance of the targets."""

    target_rows = 3

    def target_sums(self, y: Tensor, f: Tensor) -> Tensor:
        """Number, mean and Σ (y − mean)² by output, (3, c): no digits cancel at a large offset."""
        y = y.double().flatten(0, -2)
        mean = y.mean(0) if len(y) else y.new_zeros(y.shape[-1])
        inside = (y - mean).square().sum(0)
        return torch.stack([torch.full_like(mean, len(y)), mean, inside])

    def joined_sums(self, one: Tensor, other: Tensor) -> Tensor:
        """Those of both together [Chan 1979]: n₁ n₂/(n₁ + n₂) (ȳ₁ − ȳ₂)² lies between the means."""
        (n, mean, inside), (k, another, within) = one, other
        share = k / (n + k).clamp_min(torch.finfo(n.dtype).tiny)
        between = n * share * (another - mean).square()
        return torch.stack([n + k, mean + share * (another - mean), inside + within + between])

    def pooled_sums(self, sums: Tensor) -> Tensor:
        """Those of all outputs as one, (3, 1)."""
        pooled = sums[:, :1]
        for column in range(1, sums.shape[1]):
            pooled = self.joined_sums(pooled, sums[:, column : column + 1])
        return pooled

    def scaled_sums(self, sums: Tensor, weight: float) -> Tensor:
        """Number and Σ (y − mean)² times a weight; the mean stays."""
        return sums * sums.new_tensor([weight, 1.0, weight])[:, None] if sums.numel() else sums
