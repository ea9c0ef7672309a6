"""The prior precision of least validation loss, on a grid."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kfac_laplace.curvature.shards import own_part, ranks_reading
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.calibrate.choice import Choice
from kfac_laplace.posterior.calibrate.held_out import (
    negative_log_likelihood,
    points_of_parts,
)
from kfac_laplace.posterior.hyperparameters import positive
from kfac_laplace.posterior.predict.scaling import Scaling
from kfac_laplace.process import draws_kept

log = logging.getLogger("kfac_laplace")


def grid_search(
    choice: Choice,
    loader: Iterable[Any] | None,
    grid: Iterable[float] | None = None,
    *,
    link: str = "auto",
    progress: bool = False,
) -> Tensor:
    """The scalar δ of least validation NLL on a grid, 10⁻⁴ … 10⁴ by default, float64.

    The NLL is that of predictions: by the link that they use, at κ and τ. Where these do not depend
    on δ, as the network's own do not, it is that of averages at κ = 1, and the log says so.

    Args:
        choice: the posterior, whose prior precisions are all replaced by each candidate, with κ
            and τ of its predictions.
        loader: validation data; read once.
        grid: candidates.
        link: by which predictions are scored; "auto" is theirs.
        progress: show a progress bar.

    Raises:
        InvalidValue: no loader, no batch, or no candidate.
    """
    if loader is None:
        raise InvalidValue(
            "a grid search needs validation data",
            where="val_loader",
            got=None,
            remedy="Pass a loader, or use method='marglik'",
        )
    check_iterable("val_loader", loader)
    posterior = choice.posterior
    candidates = _candidates(grid, posterior.device)
    ranks = ranks_reading(posterior.ggn.options.process_group, loader)
    with draws_kept():  # read once: what shuffles or augments is the same for all candidates
        if ranks is None:
            batches = list(loader)
        else:
            part = own_part(loader, ranks)
            batches = ranks.together(lambda: list(part))
    hyper, likelihood = posterior.hyperparameters.detached(), posterior.ggn.likelihood
    kappa, tau, link = _showing(choice.scaling, likelihood, link)
    losses = []
    for delta in tqdm(candidates, desc="prior precision", disable=not progress, leave=False):
        moved = posterior.at(replace(hyper, prior_precision=posterior.prior.full(delta)))
        points = points_of_parts(moved, batches, choice.key_y, ranks, "val_loader").at(kappa, tau)
        loss = negative_log_likelihood(
            likelihood, points, hyper.sigma_noise, 1.0, link=link, seed=choice.seed
        )
        losses.append(loss)
    return candidates[losses.index(min(losses))]


def _candidates(grid: Iterable[float] | None, device: torch.device) -> list[Tensor]:
    """Checked prior precisions."""
    if grid is not None:
        check_iterable("grid", grid, "prior precisions")
    values = (
        torch.logspace(-4, 4, 21, dtype=torch.float64, device="cpu").tolist()
        if grid is None
        else list(grid)
    )
    candidates = [positive(value, "grid", device) for value in values]
    if not candidates:
        raise InvalidValue("no candidates", where="grid", got="an empty grid")
    return candidates


def _showing(scaling: Scaling, likelihood: Likelihood, asked: str) -> tuple[float, float, str]:
    """κ, τ and the link of predictions, or of such as depend on δ."""
    kappa, tau = float(scaling.scale), float(scaling.temperature)
    link = scaling.auto(likelihood) if asked == "auto" else asked
    if kappa and link != "mode":
        return kappa, tau, link
    log.info(
        "predictions do not depend on δ %s: the grid search scores averages at κ = 1",
        "until a scale is set" if kappa else "at κ = 0",
    )
    return 1.0, tau, "auto" if link == "mode" else link
