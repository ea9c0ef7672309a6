"""The evidence by the exact curvature of all parameters together, in the dual form.

log q(D) = log p(D | θ*)/T − ½ [log det(I + s Σ_l K_l/δ_l) + (θ*−μ)ᵀ P₀ (θ*−μ)], s = 1/(σ²T), where
K_l = J_l J_lᵀ over the output columns of the data: J_l is their derivative by the entries that
share precision l, with Λ^½ applied.
"""

from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.log_dets import LogDet, log_det


@dataclass(frozen=True, eq=False)
class DualEvidence:
    """The evidence under a log-determinant of rows, of one expansion at any hyperparameters.

    Args:
        name: of the objective.
        part: the log-determinant.
        around: log-determinants that are not above and not below the exact one, if any.
    """

    name: str
    part: LogDet
    around: tuple[LogDet, LogDet] | None = None

    @property
    def __name__(self) -> str:
        """As messages call it."""
        return self.name

    def __call__(self, posterior: Posterior) -> Tensor:
        """The evidence, differentiable in δ, σ and T."""
        fit = posterior.log_likelihood / posterior.hyperparameters.temperature
        return fit - 0.5 * (self.log_det_ratio(posterior) + posterior.scatter)

    def log_det_ratio(self, posterior: Posterior) -> Tensor:
        """log det P − log det P₀."""
        return log_det(self.part, _weights(posterior))

    def bracket(self, posterior: Posterior) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Evidences not above and not below that of the exact curvature, where they are known."""
        if self.around is None:
            return None, None
        fit = posterior.log_likelihood / posterior.hyperparameters.temperature
        weights, scatter = _weights(posterior), posterior.scatter
        below, above = (fit - 0.5 * (log_det(part, weights) + scatter) for part in self.around)
        return above, below

    def curvature(self, posterior: Posterior) -> Tensor:
        """tr K_l of each precision."""
        return self.part.traces

    def effective_dimensions(self, posterior: Posterior) -> Tensor:
        """γ_l = tr[(I + s Σ K/δ)⁻¹ s K_l/δ_l], (length of the prior,); their sum is ≤ the rows."""
        weights = _weights(posterior).detach()
        return weights * self.part.slopes(weights)[1]


def _weights(posterior: Posterior) -> Tensor:
    """s/δ of every precision."""
    delta = posterior.prior.full(posterior.hyperparameters.prior_precision)
    return posterior.scale / delta
