"""The Laplace evidence under the posterior's own curvature."""

from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.registry import objective


@objective("auto", "kron")
def log_marginal_likelihood(posterior: Posterior) -> Tensor:
    """log q(D) = log p(D | θ*)/T − ½ [log det P − log det P₀ + (θ*−μ)ᵀ P₀ (θ*−μ)] [ML21, eq. 6].

    Args:
        posterior: at the hyperparameters in question; no data pass is made.
    """
    return posterior.log_marginal_likelihood
