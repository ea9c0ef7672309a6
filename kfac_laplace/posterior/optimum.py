"""What a search for hyperparameters is told, and what it found."""

import logging
import math
from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.posterior.bounds import Bounds
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.objectives import Objective

log = logging.getLogger("kfac_laplace")


@dataclass(frozen=True)
class Search:
    """What to maximise, in what, and when to stop.

    Args:
        objective: function of a posterior.
        free: names of the hyperparameters that move.
        n_steps: most iterations.
        tolerance: converged once every component of the gradient is below it, in nats per unit of
            log δ or log σ; ends of the range count as such.
        bounds: how far it goes.
    """

    objective: Objective
    free: tuple[str, ...]
    n_steps: int
    tolerance: float = 1e-5
    bounds: Bounds | None = None

    def within(self, posterior: Posterior) -> Bounds:
        """The bounds, those around the posterior's own hyperparameters where none are given."""
        return self.bounds or Bounds.of(posterior, self.objective, self.free)

    def value(self, posterior: Posterior) -> Tensor:
        """The objective, checked to be one number."""
        return value_of(self.objective, posterior)


@dataclass(frozen=True)
class Optimum:
    """Where a maximisation ended.

    Args:
        hyperparameters: the best values found.
        value: the objective there.
        converged: whether the stopping rule was met.
        n_steps: steps taken.
        bounds: how far it could go.
        residual: largest component of the gradient there that leads inside the bounds.
    """

    hyperparameters: Hyperparameters
    value: float
    converged: bool
    n_steps: int
    bounds: Bounds
    residual: float


def value_of(objective: Objective, posterior: Posterior) -> Tensor:
    """An objective's value, shape ().

    Raises:
        InvalidType: it returned no tensor.
        InvalidValue: it returned several numbers.
    """
    value = objective(posterior)
    if not isinstance(value, Tensor):
        raise InvalidType(
            "an objective returns a tensor",
            where="objective",
            got=type(value).__name__,
            remedy="Keep to tensor arithmetic, so that gradients reach the hyperparameters",
        )
    if value.numel() != 1:
        raise InvalidValue(
            "an objective returns one number", where="objective", got=tuple(value.shape)
        )
    return value.reshape(())


def slope_of(objective: Objective, posterior: Posterior) -> Tensor:
    """An objective's value to be differentiated.

    Raises:
        UnsupportedUse: it does not depend on the free hyperparameters by tensor arithmetic.
    """
    value = value_of(objective, posterior)
    if not value.requires_grad:
        raise UnsupportedUse(
            "the objective has no gradient in the hyperparameters",
            where="objective",
            got=getattr(objective, "__name__", repr(objective)),
            remedy="Compute it from posterior.hyperparameters by tensor arithmetic, undetached",
        )
    return value


def report(optimum: Optimum) -> Optimum:
    """Say so where a maximisation did not converge."""
    if not optimum.converged:
        log.warning(
            "maximisation did not converge in %d steps (%s)",
            optimum.n_steps,
            f"residual {optimum.residual:.2e}; raise n_steps or loosen the tolerance"
            if math.isfinite(optimum.residual)
            else "the objective or its gradient is not finite; nothing was changed",
        )
    return optimum
