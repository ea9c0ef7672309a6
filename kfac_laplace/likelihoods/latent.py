"""A Gaussian over outputs, and the points at which averages over it are taken."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.likelihoods.links import sample_outputs

#: Averages over a single output are sums over so many points, up to so many deviations away. The
#: trapezoidal rule has a relative error below 2 exp(−2π² w²) for what varies over w of its steps:
#: 2e-8 where the likelihood is as wide as a twelfth of the Gaussian (w = 1).
POINTS, REACH = 201, 8.5


@dataclass(frozen=True)
class Latent:
    """N(mean, covariance) over output rows, or samples of them.

    Args:
        mean: shape (n, t, c).
        covariance: of each row, shape (n, t, c, c).
        samples: outputs (s, n, t, c); where given, averages are taken over them.
        seed: seed of the samples drawn where none are given.
        n_samples: their number.
    """

    mean: Tensor
    covariance: Tensor
    samples: Tensor | None = None
    seed: int = 0
    n_samples: int = 100

    @cached_property
    def draws(self) -> Tensor:
        """Samples (s, n, t, c): those given, or draws by the seed."""
        if self.samples is not None:
            return self.samples
        generator = torch.Generator().manual_seed(self.seed)
        return sample_outputs(self.mean, self.covariance, self.n_samples, generator)

    @cached_property
    def points(self) -> tuple[Tensor, Tensor]:
        """Outputs (k, n, t, c) and logarithms (k,) of their weights, which add up to one.

        The samples where they are given; otherwise for one output the points of a rule, for several
        the draws.
        """
        if self.samples is not None or self.mean.shape[-1] > 1:
            f = self.draws
            return f, f.new_zeros(len(f)).log_softmax(0)
        z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64, device=self.mean.device)
        variance = self.covariance[..., 0]  # rounding may end below zero
        some = variance > 0  # the root has no derivative at zero
        deviation = torch.where(some, variance.where(some, 1.0).sqrt(), 0.0)
        f = self.mean + z[:, None, None, None].to(deviation) * deviation
        return f, (-0.5 * z.square()).log_softmax(0).to(f)
