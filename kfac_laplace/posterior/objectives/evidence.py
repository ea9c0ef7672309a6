"""The Laplace evidence under the posterior's own curvature."""

from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.registry import (
    CountsDimensions,
    Objective,
    objective,
)


@objective("auto", "kron")
def log_marginal_likelihood(posterior: Posterior) -> Tensor:
    """log q(D) = log p(D | θ*)/T − ½ [log det P − log det P₀ + (θ*−μ)ᵀ P₀ (θ*−μ)] [ML21, eq. 6].

    Args:
        posterior: at the hyperparameters in question; no data pass is made.
    """
    return posterior.log_marginal_likelihood


class OwnCurvature:
    """γ by the posterior's own curvature."""

    def curvature(self, posterior: Posterior) -> Tensor:
        """Σ H_kk by shared precision, at σ = T = 1."""
        return posterior.expansion.curvature

    def effective_dimensions(self, posterior: Posterior) -> Tensor:
        """γ by shared precision."""
        return posterior.effective_dimensions()


def dimensions_of(objective: Objective) -> CountsDimensions | None:
    """What counts the directions of an objective that is an evidence; None for any other."""
    if objective is log_marginal_likelihood:
        return OwnCurvature()
    return objective if isinstance(objective, CountsDimensions) else None
