"""A hyperprior on prior precisions beside any objective."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from kfac_laplace.options import check_positive
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.registry import (
    AnyObjective,
    Data,
    on_data,
    resolve_objective,
)


@dataclass(frozen=True)
class GammaHyperprior:
    """An objective plus Σ_l log p(log δ_l) for δ_l ~ Gamma(a, b), independently.

    p is the density in log δ, the coordinate in which precisions are tuned: log p(log δ) =
    a log δ − b δ + a log b − log Γ(a), largest at δ = a/b, the mean. The density in δ itself has
    a − 1 in place of a. Precisions of parameters without effect have no part.

    Args:
        shape: a.
        rate: b.
        objective: what it is added to, a name or a function.

    Example:
        >>> from kfac_laplace.posterior.objectives import GammaHyperprior
        >>> weak = GammaHyperprior(shape=1.0, rate=1.0, objective="columns")

    Raises:
        InvalidValue: a or b not positive, or an unknown name.
    """

    shape: float
    rate: float
    objective: str | AnyObjective = "auto"

    #: No fixed point is known of it, nor how much there is to gain.
    evidence = False

    def __post_init__(self) -> None:
        """Check all three."""
        check_positive("shape", self.shape)
        check_positive("rate", self.rate)
        resolve_objective(self.objective)

    def on(self, posterior: Posterior, data: Data) -> "GammaHyperprior":
        """The same with its objective as a function, after the pass over the data that it makes.

        Args:
            posterior: at its mode.
            data: its training data.
        """
        inner = on_data(resolve_objective(self.objective), posterior, data)
        return replace(self, objective=inner)

    def __call__(self, posterior: Posterior) -> Tensor:
        """The sum, differentiable in δ, σ and T.

        Args:
            posterior: at the hyperparameters in question.
        """
        inner = resolve_objective(self.objective)
        assert callable(inner)
        delta = posterior.prior.full(posterior.hyperparameters.prior_precision)
        own = self.shape * delta.log() - self.rate * delta
        own = own + (self.shape * math.log(self.rate) - math.lgamma(self.shape))
        return inner(posterior) + own.masked_fill(posterior.unused_precisions, 0).sum()
