"""The posterior scale κ: the predictive covariance times κ, chosen by predictive likelihood.

Linearised Laplace predictives are underconfident, whatever the structure of H and the link. κ
multiplies the covariance that predictives use, never the evidence; κ = 0 is the mode.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.options import check_choice
from kfac_laplace.posterior.calibrate.held_out import (
    HeldOut,
    negative_log_likelihood,
    validation_points,
)
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points
from kfac_laplace.posterior.gaussian import Posterior

log = logging.getLogger("kfac_laplace")

#: Candidates for κ before the search is refined between them; 0 and 1 are always among them.
GRID = torch.logspace(-6, 3, 46, dtype=torch.float64).tolist()


def held_out_points(
    posterior: Posterior,
    method: str,
    loaders: Sequence[Iterable[Any] | None],
    key_y: str,
    seed: int,
) -> HeldOut:
    """Points to calibrate on, by leave-one-out ("loo") or from held-out data ("validation").

    Args:
        posterior: the posterior to be calibrated.
        method: "loo" or "validation".
        loaders: training data for "loo", held-out data for "validation".
        key_y: name of the targets in mappings.
        seed: seed of the choice of points for "loo".
    """
    check_choice("method", method, ("loo", "validation"))
    given = [loader for loader in loaders if loader is not None]
    if not given:
        raise InvalidValue(
            "no data to calibrate on",
            where="loader",
            got=None,
            remedy="Pass the loader: held-out data for 'validation', training data for 'loo'",
        )
    batches = (batch for loader in given for batch in loader)
    if method == "loo":
        return leave_one_out_points(posterior, batches, key_y, seed)
    return validation_points(posterior, batches, key_y)


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
    if best == GRID[-1]:
        log.warning("κ stopped at the end of its range, %.0f: the points fit no scale", best)
    centre, step = math.log(best), math.log(GRID[1] / GRID[0])
    found = minimize_scalar(
        loss, bounds=(centre - step, centre + step), method="bounded", options={"xatol": 1e-4}
    )
    return math.exp(found.x) if float(found.fun) < losses[best] else best
