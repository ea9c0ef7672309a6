"""The prior precision of least validation loss, on a grid."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.calibrate.held_out import (
    negative_log_likelihood,
    validation_points,
)
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import positive
from kfac_laplace.posterior.predict.scaling import Scaling


def grid_search(
    posterior: Posterior,
    loader: Iterable[Any] | None,
    key_y: str,
    scaling: Scaling,
    grid: Iterable[float] | None = None,
) -> Tensor:
    """The scalar δ of least validation NLL on a grid, 10⁻⁴ … 10⁴ by default, float64.

    Args:
        posterior: its prior precisions are all replaced by each candidate.
        loader: validation data; read once for each candidate.
        key_y: name of the targets in mappings.
        scaling: κ and τ of the predictive, whose link is the probit.
        grid: candidates.
    """
    if loader is None:
        raise InvalidValue(
            "a grid search needs validation data",
            where="val_loader",
            got=None,
            remedy="Pass a loader, or use method='marglik'",
        )
    check_iterable("val_loader", loader)
    if grid is not None:
        check_iterable("grid", grid, "prior precisions")
    values = torch.logspace(-4, 4, 21, dtype=torch.float64).tolist() if grid is None else list(grid)
    candidates = [positive(value, "grid", posterior.device) for value in values]
    if not candidates:
        raise InvalidValue("no candidates", where="grid", got="an empty grid")
    batches = list(loader)
    hyper = posterior.hyperparameters.detached()
    # At κ = 0 no precision shows.
    kappa, tau = float(scaling.scale) or 1.0, float(scaling.temperature)
    losses = []
    for delta in candidates:
        moved = posterior.at(replace(hyper, prior_precision=posterior.prior.full(delta)))
        points = validation_points(moved, batches, key_y).at(kappa, tau)
        losses.append(
            negative_log_likelihood(posterior.ggn.likelihood, points, hyper.sigma_noise, 1.0)
        )
    return candidates[losses.index(min(losses))]
