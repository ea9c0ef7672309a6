"""The evidence by random columns of each example's Λ^½: a lower bound of the log-determinant.

E[v vᵀ] = Λ for v = Λ^½ z with random signs z, so that the log-determinant, concave in the kernel,
is in expectation at most the exact one; a random subset of the examples, scaled, likewise [NTK23].
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.fisher import Hybrid
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.options import check_whole
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.log_dets import Sum
from kfac_laplace.posterior.objectives.dual import DualEvidence
from kfac_laplace.posterior.objectives.forms import log_det_of
from kfac_laplace.posterior.objectives.points import Looked, chosen_points, count_of
from kfac_laplace.posterior.objectives.registry import NAMED, Data


@dataclass(frozen=True)
class Columns:
    """log det(I + s Σ K_l/δ_l) over random columns.

    Args:
        each: number r of columns of each example, one backward pass each.
        rows: M, at most so many rows: where N·r is larger, M/r random examples count N·r/M times.
    """

    each: int = 1
    rows: int = 512

    #: Of what it becomes γ is known.
    evidence = True

    def __post_init__(self) -> None:
        """Check both numbers."""
        check_whole("each", self.each, 1)
        check_whole("rows", self.rows, self.each)

    def on(self, posterior: Posterior, data: Data) -> DualEvidence:
        """By one pass over the data, or a part of them, and r backward passes.

        Args:
            posterior: at its mode.
            data: its training data.
        """
        n_data = int(posterior.ggn.n_data)
        count = min(n_data, self.rows // self.each)
        looked = Looked(posterior, Signed(self.each), self.each)
        points = chosen_points(posterior, data, count)
        taken = count_of(points)
        part = log_det_of(looked, points, taken * self.each)
        scaled = Sum([(1.0, n_data / taken, part)])
        return DualEvidence("columns", scaled)


@dataclass(frozen=True)
class Signed:
    """Vectors Σ_k z_k D S_k/√r over all roots S_k of Λ, with random signs z: E v vᵀ = D Λ D/r.

    Their squared lengths vary less than those of scores of drawn labels, which are nearly zero or
    large where the model is sure of itself.

    Args:
        count: number r of vectors.
    """

    count: int = 1

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Vectors (n, t, c), with independent signs for every example and position."""
        for _ in range(self.count):
            (vector,) = Hybrid(passes=1).vectors(likelihood, f, y, generator)
            yield vector / self.count**0.5


NAMED["columns"] = Columns()
