"""MacKay's fixed point of the evidence: no gradient, no learning rate [MacKay 1992]."""

from dataclasses import replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.posterior.bounds import Bounds
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.objectives import AnyObjective, DataObjective, Objective
from kfac_laplace.posterior.objectives.evidence import dimensions_of, log_marginal_likelihood
from kfac_laplace.posterior.optimum import Optimum, Search


def mackay(posterior: Posterior, search: Search) -> Optimum:
    """MacKay's fixed point: δ ← γ/‖θ* − μ‖² for each shared precision, σ² ← RSS/(N C − T γ).

    γ = Σ τμλ/(τμλ + δ) counts the directions that the data determine; no learning rate.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        search: when to stop, and whether σ moves.

    Raises:
        UnsupportedUse: a free noise that is not Gaussian.
    """
    with torch.no_grad():
        step, here = 0, FixedPoint.within(posterior, search)
        while step < search.n_steps and here.slope > search.tolerance:
            step += 1
            before, here = here, here.next()
            if here is before:  # no step climbs: as far as the arithmetic goes
                break
    hyper, converged = here.posterior.hyperparameters, here.slope <= search.tolerance
    return Optimum(hyper, here.evidence, converged, step, here.bounds, here.slope)


def mackay_steps(posterior: Posterior, search: Search) -> Hyperparameters:
    """The hyperparameters after some steps of the fixed point.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        search: how many steps, in what, and how far.
    """
    with torch.no_grad():
        place = FixedPoint.within(posterior, search)
        for _ in range(search.n_steps):
            place = place.next()
    return place.posterior.hyperparameters


def check_objective(objective: AnyObjective) -> None:
    """Raise `InvalidValue` for any objective but an evidence, whose fixed point it is."""
    known = objective.evidence if isinstance(objective, DataObjective) else dimensions_of(objective)
    if not known:
        raise InvalidValue(
            "MacKay's fixed point is that of the evidence",
            where="method",
            got=f"'mackay' with objective {getattr(objective, '__name__', repr(objective))}",
            remedy="Use method='marglik', which follows the gradient of any objective",
        )


class FixedPoint:
    """One place on MacKay's way, with the evidence and its gradient there.

    Args:
        posterior: at the present hyperparameters.
        free: names of the hyperparameters that move.
        bounds: how far they go; around the posterior's own by default.
        objective: the evidence whose fixed point it is.

    Raises:
        UnsupportedUse: a free noise that is not Gaussian, or other free hyperparameters.
    """

    def __init__(
        self,
        posterior: Posterior,
        free: tuple[str, ...],
        bounds: Bounds | None = None,
        objective: Objective = log_marginal_likelihood,
    ):
        likelihood = posterior.ggn.likelihood
        noise = "sigma_noise" in free
        if noise and not likelihood.has_gaussian_noise:
            raise UnsupportedUse(
                "MacKay's formula for the noise holds for Gaussian noise alone",
                where=type(likelihood).__name__,
                remedy="Use method='marglik', or fix_sigma_noise=True",
            )
        others = set(free) - {"prior_precision", "sigma_noise"}
        if others:
            raise UnsupportedUse(
                "MacKay's fixed point knows prior precisions and Gaussian noise alone",
                where="method",
                got=f"free {sorted(others)}",
                remedy="Use method='marglik'",
            )
        hyper = posterior.hyperparameters.detached()
        delta = posterior.prior.full(hyper.prior_precision)
        self.posterior = posterior.at(replace(hyper, prior_precision=delta))
        self.free, self.noise = free, noise
        self.bounds = bounds or Bounds.of(self.posterior, objective, free)
        self.objective, self.evidence = objective, float(objective(self.posterior))
        self._gamma = self.bounds.gamma(self.posterior)
        self._squares = posterior.squares

    @classmethod
    def within(cls, posterior: Posterior, search: Search) -> "FixedPoint":
        """The place of a posterior under what a search maximises, in what, and how far."""
        return cls(posterior, search.free, search.within(posterior), search.objective)

    @property
    def _free_outputs(self) -> Tensor:
        """N C − T γ, the outputs that the noise has to explain."""
        hyper = self.posterior.hyperparameters
        return self.posterior.ggn.n_outputs - hyper.temperature * self._gamma.sum()

    @property
    def slope(self) -> float:
        """Largest component of the evidence's gradient in log δ and log σ that leads inside."""
        hyper = self.posterior.hyperparameters
        slopes = 0.5 * (self._gamma - hyper.prior_precision * self._squares)
        largest = float(self.bounds.inward(hyper, "prior_precision", slopes).abs().max())
        if not self.noise:
            return largest
        statistic = self.posterior.ggn.statistic
        by_sigma = (statistic / hyper.sigma_noise**2 - self._free_outputs) / hyper.temperature
        return max(largest, abs(float(self.bounds.inward(hyper, "sigma_noise", by_sigma))))

    def next(self) -> "FixedPoint":
        """The next place: the fixed-point step, shortened until the evidence does not fall.

        Each coordinate moves along its gradient, so a short enough step climbs.
        """
        hyper = self.posterior.hyperparameters
        tiny = torch.finfo(torch.float64).tiny
        # γ = 0 or θ = μ ask for δ → 0 or ∞: a factor of 1000 a step is the way there.
        target = self._gamma.clamp_min(tiny) / self._squares.clamp_min(tiny)
        log_delta = (target / hyper.prior_precision).clamp(1e-3, 1e3).log()
        log_sigma = torch.zeros_like(hyper.sigma_noise)
        if self.noise:
            free, rss = self._free_outputs, self.posterior.ggn.statistic
            # No output left over to explain: up, whatever the residuals are.
            variance = torch.where(free > 0, rss / free.clamp_min(tiny), torch.inf)
            log_sigma = 0.5 * (variance / hyper.sigma_noise**2).clamp(1e-6, 1e6).log()
        length = 1.0
        while True:
            moved = replace(
                hyper,
                prior_precision=hyper.prior_precision * (length * log_delta).exp(),
                sigma_noise=hyper.sigma_noise * (length * log_sigma).exp(),
            )
            moved = self.bounds.inside(moved, hyper)
            there = self._at(moved)
            if there is not None and there.evidence >= self.evidence:
                return there
            if length < 1e-6:
                return self
            length /= 2

    def _at(self, hyper: Hyperparameters) -> "FixedPoint | None":
        """Another place, or None where the posterior precision has no factor in float64."""
        try:
            return FixedPoint(self.posterior.at(hyper), self.free, self.bounds, self.objective)
        except InvalidValue:
            return None
