"""A Gaussian f = m + φ z, z ~ N(0, 1), given noisy observations of some of its values."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Values:
    """Values f = m + φ z of a batch of points.

    Args:
        mean: m, shape (*b, k).
        features: φ, shape (*b, k, p).
    """

    mean: Tensor
    features: Tensor


@dataclass(frozen=True)
class Observations:
    """Observations y = f + ε, ε ~ N(0, noise), of some values.

    Args:
        features: φ of the values that were observed, shape (*b, n, p).
        residuals: y − m, shape (*b, n); axes in front of the features' are other observations of
            the same points.
        noise: variances, shape (*b, n), positive.
    """

    features: Tensor
    residuals: Tensor
    noise: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batches of observations, by broadcasting."""
        return torch.broadcast_shapes(
            self.features.shape[:-2], self.residuals.shape[:-1], self.noise.shape[:-1]
        )

    def and_also(self, more: "Observations") -> "Observations":
        """Both together; their batches broadcast."""
        parts = zip(self._parts, more._parts, (-2, -1, -1), strict=True)
        return Observations(*(_joined(a, b, axis) for a, b, axis in parts))

    def moments(self, values: Values) -> tuple[Tensor, Tensor]:
        """Mean (*b, k) and covariance (*b, k, k) of values given the observations.

        m' + K' (K + noise)⁻¹ (y − m) and φ' φ'ᵀ − K' (K + noise)⁻¹ K'ᵀ, K = φ φᵀ, K' = φ' φᵀ.

        Args:
            values: at other points, or the same; their batches broadcast.
        """
        cross = self.features @ values.features.mT  # (*b, n, k)
        half = torch.linalg.solve_triangular(self._root, cross, upper=False)
        gain = (half.mT @ self._white)[..., 0]
        covariance = values.features @ values.features.mT - half.mT @ half
        mean = values.mean + gain
        return mean, covariance.expand(*mean.shape, mean.shape[-1])

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.features, self.residuals, self.noise

    @cached_property
    def _root(self) -> Tensor:
        """Cholesky factor of K + noise, (*b, n, n)."""
        gram = self.features @ self.features.mT
        return torch.linalg.cholesky(gram + torch.diag_embed(self.noise))

    @cached_property
    def _white(self) -> Tensor:
        """Residuals that are independent, with variance 1, (*b, n, 1)."""
        residuals = self.residuals[..., None]
        return torch.linalg.solve_triangular(self._root, residuals, upper=False)


def _joined(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """Both behind one another along an axis from the end; those in front of it broadcast."""
    lead = torch.broadcast_shapes(first.shape[:axis], second.shape[:axis])
    return torch.cat([part.expand(*lead, *part.shape[axis:]) for part in (first, second)], axis)
