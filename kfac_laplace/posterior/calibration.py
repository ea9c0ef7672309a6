"""The posterior scale κ: the predictive covariance times κ, chosen by predictive likelihood.

Linearised Laplace predictives are underconfident, whatever the structure of H and the link. κ
multiplies the covariance that predictives use, never the evidence; κ = 0 is the mode.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.held_out import HeldOut, negative_log_likelihood, validation_points
from kfac_laplace.priors import positive

#: Candidates for κ before the search is refined between them; 0 and 1 are always among them.
GRID = torch.logspace(-6, 3, 46, dtype=torch.float64).tolist()


def best_scale(likelihood: Likelihood, points: HeldOut, sigma: Tensor) -> float:
    """κ ≥ 0 of least negative log predictive likelihood, by a grid refined between neighbours.

    Args:
        likelihood: p(y | f).
        points: held-out outputs at κ = 1, with their targets.
        sigma: observation noise σ.
    """

    def loss(log_kappa: float) -> float:
        return negative_log_likelihood(likelihood, points, sigma, math.exp(log_kappa))

    losses = {kappa: loss(math.log(kappa)) for kappa in (*GRID, 1.0)}
    losses[0.0] = negative_log_likelihood(likelihood, points, sigma, 0.0)
    best = min(losses, key=losses.__getitem__)
    if best == 0.0:
        return best
    centre, step = math.log(best), math.log(GRID[1] / GRID[0])
    found = minimize_scalar(
        loss, bounds=(centre - step, centre + step), method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x) if float(found.fun) < losses[best] else best


def grid_search(
    posterior: Posterior,
    loader: Iterable[Any],
    key_y: str,
    kappa: float,
    grid: Iterable[float] | None = None,
) -> Tensor:
    """The scalar δ of least validation NLL on a grid, 10⁻⁴ … 10⁴ by default, float64.

    Args:
        posterior: its prior precisions are all replaced by each candidate.
        loader: validation data; read once for each candidate.
        key_y: name of the targets in mappings.
        kappa: posterior scale κ of the predictive.
        grid: candidates.
    """
    values = torch.logspace(-4, 4, 21, dtype=torch.float64).tolist() if grid is None else list(grid)
    candidates = [positive(value, "grid", posterior.device) for value in values]
    if not candidates:
        raise InvalidValue("no candidates", where="grid", got="an empty grid")
    batches = list(loader)
    hyper = posterior.hyperparameters.detached()
    losses = []
    for delta in candidates:
        moved = posterior.at(replace(hyper, prior_precision=posterior.prior.full(delta)))
        points = validation_points(moved, batches, key_y)
        losses.append(
            negative_log_likelihood(
                posterior.curvature.likelihood, points, hyper.sigma_noise, kappa
            )
        )
    return candidates[losses.index(min(losses))]
