"""Evidence maximisation on cached eigenvalues: by gradient, and MacKay's fixed point."""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.posterior.gaussian import Hyperparameters, Posterior

log = logging.getLogger("kfac_laplace")


@dataclass(frozen=True)
class Optimum:
    """Where a maximisation ended.

    Args:
        hyperparameters: the best values found.
        evidence: log q(D) there.
        converged: whether the stopping rule was met.
        n_steps: steps taken.
    """

    hyperparameters: Hyperparameters
    evidence: float
    converged: bool
    n_steps: int


def optimise(
    posterior: Posterior, method: str, *, fix_sigma_noise: bool, n_steps: int, tolerance: float
) -> Optimum:
    """Maximise the evidence by "marglik" (gradient) or "mackay" (fixed point).

    Other arguments as for `maximise` and `mackay`.
    """
    methods = {"marglik": maximise, "mackay": mackay}
    if method not in methods:
        raise InvalidValue(
            "unknown method",
            where="method",
            got=repr(method),
            remedy=f"Choose one of {[*methods, 'gridsearch']}",
        )
    return methods[method](
        posterior, fix_sigma_noise=fix_sigma_noise, n_steps=n_steps, tolerance=tolerance
    )


class LogHyperparameters:
    """log δ and log σ as leaves: the free coordinates of the evidence.

    Args:
        start: initial values.
        length: number of prior precisions.
        with_noise: whether σ is free.
    """

    def __init__(self, start: Hyperparameters, length: int, with_noise: bool):
        with torch.inference_mode(False):
            delta = start.prior_precision.detach().reshape(-1).expand(length)
            self.log_delta = delta.log().clone().requires_grad_()
            self.log_sigma = start.sigma_noise.detach().log().clone().requires_grad_(with_noise)
        self.temperature = start.temperature.detach()

    @property
    def leaves(self) -> list[Tensor]:
        """The free tensors."""
        return [leaf for leaf in (self.log_delta, self.log_sigma) if leaf.requires_grad]

    def value(self) -> Hyperparameters:
        """δ, σ and T with gradients towards the leaves."""
        return Hyperparameters(self.log_delta.exp(), self.log_sigma.exp(), self.temperature)


def maximise(
    posterior: Posterior, *, fix_sigma_noise: bool, n_steps: int, tolerance: float
) -> Optimum:
    """Maximise the evidence in log δ and log σ by L-BFGS with a strong-Wolfe line search.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        fix_sigma_noise: keep σ.
        n_steps: most iterations.
        tolerance: converged once every component of the gradient is below it, in nats per unit of
            log δ or log σ.
    """
    noise = posterior.ggn.likelihood.has_noise and not fix_sigma_noise
    free = LogHyperparameters(posterior.hyperparameters, posterior.prior.length, noise)
    optimiser = torch.optim.LBFGS(
        free.leaves,
        max_iter=n_steps,
        max_eval=3 * n_steps,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -posterior.at(free.value()).log_marginal_likelihood
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(closure)
        final = -closure().detach()
    if not bool(torch.isfinite(final)) or not all(
        bool(leaf.isfinite().all()) for leaf in free.leaves
    ):
        start = posterior.hyperparameters.detached()
        return _report(Optimum(start, float("nan"), False, n_steps), float("nan"))
    slope = max(float(leaf.grad.abs().max()) for leaf in free.leaves if leaf.grad is not None)
    steps = int(optimiser.state[free.leaves[0]]["n_iter"])
    return _report(
        Optimum(free.value().detached(), float(final), slope <= 10 * tolerance, steps), slope
    )


def mackay(
    posterior: Posterior, *, fix_sigma_noise: bool, n_steps: int, tolerance: float
) -> Optimum:
    """MacKay's fixed point: δ ← γ/‖θ* − μ‖² for each shared precision, σ² ← RSS/(N C − T γ).

    γ = Σ τμλ/(τμλ + δ) counts the directions that the data determine; no learning rate.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        fix_sigma_noise: keep σ.
        n_steps: most iterations.
        tolerance: converged once every component of the gradient is below it, in nats per unit of
            log δ or log σ.

    Raises:
        UnsupportedUse: a free noise that is not Gaussian.
    """
    noise = posterior.ggn.likelihood.has_noise and not fix_sigma_noise
    with torch.no_grad():
        step, here = 0, FixedPoint(posterior, noise)
        while step < n_steps and here.slope > tolerance:
            step += 1
            before, here = here, here.next()
            if here is before:  # no step climbs: as far as the arithmetic goes
                break
    hyper = here.posterior.hyperparameters
    return _report(Optimum(hyper, here.evidence, here.slope <= tolerance, step), here.slope)


class FixedPoint:
    """One place on MacKay's way, with the evidence and its gradient there.

    Args:
        posterior: at the present hyperparameters.
        noise: whether σ is free.

    Raises:
        UnsupportedUse: a free noise that is not Gaussian.
    """

    def __init__(self, posterior: Posterior, noise: bool):
        likelihood = posterior.ggn.likelihood
        if noise and not likelihood.has_gaussian_noise:
            raise UnsupportedUse(
                "MacKay's formula for the noise holds for Gaussian noise alone",
                where=type(likelihood).__name__,
                remedy="Use method='marglik', or fix_sigma_noise=True",
            )
        hyper = posterior.hyperparameters.detached()
        delta = posterior.prior.full(hyper.prior_precision)
        self.posterior = posterior.at(replace(hyper, prior_precision=delta))
        self.noise = noise
        self.evidence = float(self.posterior.log_marginal_likelihood)
        self._gamma = self.posterior.effective_dimensions()
        self._squares = posterior.shared_squares

    @property
    def _free_outputs(self) -> Tensor:
        """N C − T γ, the outputs that the noise has to explain."""
        hyper = self.posterior.hyperparameters
        return self.posterior.ggn.n_outputs - hyper.temperature * self._gamma.sum()

    @property
    def slope(self) -> float:
        """Largest component of the evidence's gradient in log δ and log σ."""
        hyper = self.posterior.hyperparameters
        slopes = 0.5 * (self._gamma - hyper.prior_precision * self._squares).abs()
        if not self.noise:
            return float(slopes.max())
        statistic = self.posterior.ggn.statistic
        by_sigma = (statistic / hyper.sigma_noise**2 - self._free_outputs) / hyper.temperature
        return max(float(slopes.max()), abs(float(by_sigma)))

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
            variance = self.posterior.ggn.statistic / self._free_outputs.clamp_min(tiny)
            log_sigma = 0.5 * (variance / hyper.sigma_noise**2).clamp(1e-6, 1e6).log()
        length = 1.0
        while True:
            moved = Hyperparameters(
                hyper.prior_precision * (length * log_delta).exp(),
                hyper.sigma_noise * (length * log_sigma).exp(),
                hyper.temperature,
            )
            there = FixedPoint(self.posterior.at(moved), self.noise)
            if there.evidence >= self.evidence or length < 1e-6:
                return there if there.evidence >= self.evidence else self
            length /= 2


def _report(optimum: Optimum, residual: float) -> Optimum:
    """Say so where a maximisation did not converge."""
    if not optimum.converged:
        log.warning(
            "evidence maximisation did not converge in %d steps (residual %.2e); "
            "raise n_steps or loosen the tolerance",
            optimum.n_steps,
            residual,
        )
    return optimum
