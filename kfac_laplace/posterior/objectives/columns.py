"""The evidence by random columns of each example's Λ^½: a lower bound of the log-determinant.

E[v vᵀ] = Λ for v = Λ^½ z with random signs z, so that the log-determinant, concave in the kernel,
is in expectation at most the exact one; a random subset of the examples, scaled, likewise [NTK23].
"""

from dataclasses import dataclass

from kfac_laplace.curvature.estimate.fisher import Hybrid
from kfac_laplace.options import check_whole
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.dual import DualEvidence
from kfac_laplace.posterior.objectives.log_dets import Sum
from kfac_laplace.posterior.objectives.points import Looked, chosen_points, log_det_of
from kfac_laplace.posterior.objectives.registry import NAMED, Data


@dataclass(frozen=True)
class Columns:
    """log det(I + s Σ K_l/δ_l) over random columns.

    Args:
        each: number r of columns of each example, one backward pass each.
        rows: M, at most so many rows: where N·r is larger, M/r random examples count N·r/M times.
    """

    each: int = 1
    rows: int = 1024

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
        looked = Looked(posterior, _Signed(self.each))
        part = log_det_of(looked, chosen_points(posterior, data, count), count * self.each)
        scaled = Sum([(1.0, n_data / count, part)])
        return DualEvidence("columns", scaled)


class _Signed:
    """r vectors Σ_k z_k S_k/√r with random signs z."""

    def __init__(self, count):
        self.count = count

    def vectors(self, likelihood, f, y, generator):
        for _ in range(self.count):
            for vector in Hybrid(passes=1).vectors(likelihood, f, y, generator):
                yield vector / self.count**0.5


NAMED["columns"] = Columns()
