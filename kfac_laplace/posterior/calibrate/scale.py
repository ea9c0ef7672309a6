"""The posterior scale κ: the predictive covariance times κ, chosen by predictive likelihood.

Linearised Laplace predictives are underconfident, whatever the structure of H and the link. κ
multiplies the covariance that predictives use, never the evidence; κ = 0 is the mode.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import scipy  # loads its parts when they are used
import torch
from torch import Tensor

from kfac_laplace.curvature.shards import check_all_data
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
GRID = torch.logspace(-6, 3, 46, dtype=torch.float64, device="cpu").tolist()

#: Losses within this of each other, beside their size, are the same, as four digits are said.
ROUNDING = 1e-3


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
    if method == "validation":
        (loader,) = given
        return validation_points(posterior, loader, key_y)
    for loader in given:
        check_all_data(posterior.ggn.options.process_group, loader, "calibrate")
    batches = (batch for loader in given for batch in loader)
    return leave_one_out_points(posterior, batches, key_y, seed)


def adopted_scale(
    likelihood: Likelihood, points: HeldOut, sigma: Tensor, *, method: str, before: float
) -> float:
    """The best scale, or the one before where leave-one-out gives no ground for it.

    Leave-one-out predicts each point from a linearisation about a mode that has seen it. Where what
    it says is worse than to say nothing, or the best scale sits at an end of the range, it is
    the linearisation that fails: the scale stays, and the log says so. Of held-out data, an end is
    an answer: 0 is the mode.

    Args:
        likelihood: p(y | f).
        points: held-out outputs at κ = 1, with their targets.
        sigma: observation noise σ.
        method: "loo" or "validation".
        before: κ as it is.
    """
    best, at_end = _search(likelihood, points, sigma)
    if method == "validation":
        if at_end and best > 0:
            log.warning(
                "κ stopped at the end of its range, %.3g: the points fit no scale. Look at the "
                "data and at sigma_noise, train further, or take more points",
                best,
            )
        return best
    left_out = negative_log_likelihood(likelihood, points, sigma, best)
    nothing = _uninformed_loss(likelihood, points)
    reason = ""
    if left_out > nothing + ROUNDING * max(1.0, abs(nothing)):
        reason = f"its best NLL, {left_out:.4g}, is worse than {nothing:.4g} of a constant"
    elif at_end:
        reason = f"its best κ, {best:.3g}, is an end of the range"
    if not reason:
        return best
    log.warning(
        "leave-one-out gives no ground for a scale: %s. κ stays %.3g; use calibrate(val_loader, "
        "method='validation')",
        reason,
        before,
    )
    return before


def best_scale(likelihood: Likelihood, points: HeldOut, sigma: Tensor) -> float:
    """κ ≥ 0 of least negative log predictive likelihood, by a grid refined between neighbours.

    Args:
        likelihood: p(y | f).
        points: held-out outputs at κ = 1, with their targets.
        sigma: observation noise σ.
    """
    return _search(likelihood, points, sigma)[0]


def _search(likelihood: Likelihood, points: HeldOut, sigma: Tensor) -> tuple[float, bool]:
    """κ of least loss, and whether it sits at an end of the range."""

    def loss(log_kappa: float) -> float:
        return negative_log_likelihood(likelihood, points, sigma, math.exp(log_kappa))

    losses = {kappa: loss(math.log(kappa)) for kappa in (*GRID, 1.0)}
    losses[0.0] = negative_log_likelihood(likelihood, points, sigma, 0.0)
    best = min(losses, key=losses.__getitem__)
    if best == 0.0:
        return best, True
    at_end = best in (GRID[0], GRID[-1])
    centre, step = math.log(best), math.log(GRID[1] / GRID[0])
    bounds = max(centre - step, math.log(GRID[0])), min(centre + step, math.log(GRID[-1]))
    found = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}
    )
    if float(found.fun) < losses[best]:
        return math.exp(found.x), False
    return best, at_end


def _uninformed_loss(likelihood: Likelihood, points: HeldOut) -> float:
    """The loss of a prediction that knows no input, infinite where none is known."""
    known = likelihood.uninformed(points.target, points.mean)
    if known is None:
        return math.inf
    mean, sigma = known
    nothing = HeldOut(mean.expand_as(points.mean), 0 * points.covariance, points.target)
    return negative_log_likelihood(likelihood, nothing, sigma, 0.0)
