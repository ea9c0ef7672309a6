"""Evidence maximisation on cached eigenvalues: by gradient, and MacKay's fixed point."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.likelihoods import Gaussian
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


class LogHyperparameters:
    """log δ and log σ as leaves: the free coordinates of the evidence.

    Args:
        start: initial values.
        length: number of prior precisions.
        with_noise: whether σ is free.
    """

    def __init__(self, start: Hyperparameters, length: int, with_noise: bool):
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
    noise = posterior.curvature.likelihood.has_noise and not fix_sigma_noise
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

    with torch.enable_grad():
        optimiser.step(closure)
        final = -closure().detach()
    slope = max(float(leaf.grad.abs().max()) for leaf in free.leaves if leaf.grad is not None)
    steps = int(optimiser.state[free.leaves[0]]["n_iter"])
    return _report(
        Optimum(free.value().detached(), float(final), slope <= 10 * tolerance, steps), slope
    )


def mackay(
    posterior: Posterior, *, fix_sigma_noise: bool, n_steps: int, tolerance: float
) -> Optimum:
    """MacKay's fixed point: δ ← γ/‖θ* − μ‖² for each shared precision, σ² ← RSS/(N C − γ).

    γ = Σ τμλ/(τμλ + δ) counts the directions that the data determine; no learning rate.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        fix_sigma_noise: keep σ.
        n_steps: most iterations.
        tolerance: converged once no log δ or log σ moves by more.
    """
    hyper = posterior.hyperparameters.detached()
    noise = posterior.curvature.likelihood.has_noise and not fix_sigma_noise
    hyper = Hyperparameters(
        posterior.prior.full(hyper.prior_precision).clone(), hyper.sigma_noise, hyper.temperature
    )
    converged, step, moved = False, 0, math.inf
    with torch.no_grad():
        while step < n_steps and not converged:
            step += 1
            updated = mackay_step(posterior.at(hyper), noise)
            moved = float((updated.prior_precision / hyper.prior_precision).log().abs().max())
            moved = max(moved, abs(float((updated.sigma_noise / hyper.sigma_noise).log())))
            hyper = updated
            converged = moved <= tolerance
        evidence = float(posterior.at(hyper).log_marginal_likelihood)
    return _report(Optimum(hyper, evidence, converged, step), moved)


def mackay_step(posterior: Posterior, noise: bool) -> Hyperparameters:
    """One update of δ, and of σ where it is free.

    Args:
        posterior: at the present hyperparameters.
        noise: whether σ is free.
    """
    hyper = posterior.hyperparameters
    dimensions = posterior.effective_dimensions()
    gamma = _shared(posterior, dimensions)
    squares = _shared(posterior, posterior.squared_deviations)
    # θ = μ exactly asks for δ → ∞: stay at the largest finite step instead of dividing by zero.
    tiny = torch.finfo(squares.dtype).tiny
    delta = gamma.clamp_min(tiny) / squares.clamp_min(tiny)
    factor = (delta / hyper.prior_precision).clamp(1e-3, 1e3)
    sigma = hyper.sigma_noise
    if noise:
        curvature = posterior.curvature
        assert isinstance(curvature.likelihood, Gaussian)
        free = (curvature.n_outputs - hyper.temperature * gamma.sum()).clamp_min(1.0)
        sigma = (curvature.statistic / free).sqrt()
    return Hyperparameters(hyper.prior_precision * factor, sigma, hyper.temperature)


def _shared(posterior: Posterior, matrices: dict[str, Tensor]) -> Tensor:
    """Sum entries by the prior's sharing: shape (length,)."""
    sharing = posterior.prior.sharing
    if sharing == "diag":
        return posterior.prior.flatten(matrices)
    sums = torch.stack([matrix.sum() for matrix in matrices.values()])
    return sums.sum().reshape(1) if sharing == "scalar" else sums


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
