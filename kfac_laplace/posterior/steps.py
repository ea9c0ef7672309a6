"""Ways to hyperparameters of a larger objective: L-BFGS, Adam, and by name MacKay's fixed point."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import unknown
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import FreeCoordinates, Hyperparameters
from kfac_laplace.posterior.mackay import check_objective, mackay
from kfac_laplace.posterior.objectives import Objective
from kfac_laplace.posterior.optimum import Optimum, Search, report, slope_of


def optimise(posterior: Posterior, method: str, search: Search) -> Optimum:
    """Maximise by "marglik" (gradient) or "mackay" (fixed point, of the evidence alone).

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        method: one of these names.
        search: what to maximise, and when to stop.

    Raises:
        InvalidValue: an unknown method, or one that the objective does not suit.
    """
    methods = {"marglik": maximise, "mackay": mackay}
    if method not in methods:
        raise unknown("method", method, [*methods, "gridsearch"])
    if method == "mackay":
        check_objective(search.objective)
    return methods[method](posterior, search)


def maximise(posterior: Posterior, search: Search) -> Optimum:
    """Maximise in the free coordinates by L-BFGS with a strong-Wolfe line search.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        search: what to maximise, and when to stop.
    """
    free = FreeCoordinates(posterior.hyperparameters, search.free)
    optimiser = torch.optim.LBFGS(
        free.leaves,
        max_iter=search.n_steps,
        max_eval=3 * search.n_steps,
        tolerance_grad=search.tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -slope_of(search.objective, posterior.at(free.value()))
        loss.backward()
        if not _finite(loss, free):
            raise _LeftTheDomain
        return loss

    try:
        with torch.inference_mode(False), torch.enable_grad():
            optimiser.step(closure)
            final = -closure().detach()
    except _LeftTheDomain:
        start = posterior.hyperparameters.detached()
        return report(Optimum(start, float("nan"), False, search.n_steps), float("nan"))
    slope = max(float(leaf.grad.abs().max()) for leaf in free.leaves if leaf.grad is not None)
    steps = int(optimiser.state[free.leaves[0]]["n_iter"])
    converged = slope <= 10 * search.tolerance
    return report(Optimum(free.value().detached(), float(final), converged, steps), slope)


class _LeftTheDomain(Exception):
    """An objective or its gradient is not finite; torch's line search would not survive it."""


def _finite(value: Tensor, free: FreeCoordinates) -> bool:
    """Whether an objective, the free coordinates and its gradient in them are finite."""
    grads = [leaf.grad for leaf in free.leaves if leaf.grad is not None]
    return all(bool(t.detach().isfinite().all()) for t in (value, *free.leaves, *grads))


def adam(
    posterior: Posterior,
    objective: Objective,
    free_names: tuple[str, ...],
    *,
    n_steps: int,
    lr: float,
    state: Mapping[str, Any] | None,
) -> tuple[Hyperparameters, dict[str, Any]]:
    """Some steps of Adam in the free coordinates, from a posterior's hyperparameters.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        objective: what to maximise.
        free_names: names of the hyperparameters that move.
        n_steps: number of steps.
        lr: learning rate, in units of log δ and log σ.
        state: Adam's state after earlier steps, left as it is; None to start anew.

    Returns:
        The hyperparameters after the steps, and Adam's state.

    Raises:
        InvalidValue: the objective or its gradient is not finite on the way.
    """
    free = FreeCoordinates(posterior.hyperparameters, free_names)
    optimiser = torch.optim.Adam(free.leaves, lr=lr)
    if state is not None:
        optimiser.load_state_dict(copy.deepcopy(dict(state)))
        optimiser.param_groups[0]["lr"] = lr
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(n_steps):
            optimiser.zero_grad()
            loss = -slope_of(objective, posterior.at(free.value()))
            loss.backward()
            if not _finite(loss, free):
                raise InvalidValue(
                    "the objective or its gradient is not finite",
                    where="objective",
                    got=f"{-float(loss.detach())} at {posterior.at(free.value()).hyperparameters}",
                    remedy="Lower lr_hyp, or keep the objective finite where hyperparameters go",
                )
            optimiser.step()
    return free.value().detached(), optimiser.state_dict()
