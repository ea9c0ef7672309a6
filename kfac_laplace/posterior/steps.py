"""Ways to hyperparameters of a larger objective: L-BFGS, Adam, and by name MacKay's fixed point."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import unknown
from kfac_laplace.posterior.bounds import Bounds
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import FreeCoordinates, Hyperparameters
from kfac_laplace.posterior.mackay import check_objective, mackay
from kfac_laplace.posterior.optimum import Optimum, Search, report, slope_of

#: Entries by name of their hyperparameter.
Masks = dict[str, Tensor]


def optimise(posterior: Posterior, method: str, search: Search) -> Optimum:
    """Maximise by "marglik" (gradient) or "mackay" (fixed point, of the evidence alone).

    Parameters without effect on the outputs have no say, and their precisions stay. Where a search
    meets an end of its range beyond which there is more to gain, the range moves on with it.

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
    here = posterior.apart_from_unused
    bounds: Bounds | None = search.within(here)
    found, steps = None, 0
    while bounds is not None and (found is None or steps < search.n_steps):
        here, bounds = bounds.begun(here, search.tolerance)
        part = replace(search, bounds=bounds, n_steps=search.n_steps - steps)
        found = methods[method](here, part)
        steps += found.n_steps
        if not math.isfinite(found.value):
            # As it was, whatever earlier parts found.
            found = replace(found, hyperparameters=posterior.hyperparameters.detached())
            break
        here = here.at(found.hyperparameters)
        bounds = bounds.moved_on(here, search.tolerance)
    assert found is not None
    if bounds is not None:  # more to gain than steps
        found = replace(found, converged=False)
    return report(replace(found, n_steps=steps))


def maximise(posterior: Posterior, search: Search) -> Optimum:
    """Maximise in the free coordinates by L-BFGS with a strong-Wolfe line search, inside bounds.

    Entries that end beyond the range are put to its end and held there for a further climb, and
    released, once each, where the slope leads back.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        search: what to maximise, and when to stop.
    """
    bounds, here, steps = search.within(posterior), posterior, 0
    held = {"prior_precision": bounds.stays} if bool(bounds.stays.any()) else {}
    released: Masks = {}
    while True:
        climb = _climb(here, search, held)
        steps += climb.n_steps
        beyond = _beyond(bounds, climb.last, held)
        if beyond:
            # The noise scales all the rest, which its way down has led astray.
            noise_alone = beyond.keys() & {"sigma_noise"} or beyond.keys()
            beyond = {name: mask for name, mask in beyond.items() if name in noise_alone}
            origin = climb.last if "sigma_noise" not in beyond else here.hyperparameters
            here = here.at(_at_the_ends(bounds, origin.detached(), climb.last, beyond))
            held = _joined(held, beyond)
            continue
        if not math.isfinite(climb.slope):
            start = posterior.hyperparameters.detached()
            return Optimum(start, math.nan, False, search.n_steps, bounds, math.nan)
        back = _leading_back(bounds, climb, held, search.tolerance)
        back = {n: m & ~released.get(n, torch.zeros_like(m)) for n, m in back.items()}
        back = {name: mask for name, mask in back.items() if bool(mask.any())}
        if not back:
            converged = climb.slope <= 10 * search.tolerance
            return Optimum(climb.last, climb.value, converged, steps, bounds, climb.slope)
        held = {name: mask & ~back[name] if name in back else mask for name, mask in held.items()}
        released = _joined(released, back)
        here = here.at(climb.last)


@dataclass(frozen=True)
class _Climb:
    """Where L-BFGS ended; the slope is infinite where it left the domain, and the place one near.

    The slopes are those of the objective in the free coordinates, by name.
    """

    last: Hyperparameters
    value: float
    slope: float
    slopes: Mapping[str, Tensor]
    n_steps: int


def _climb(posterior: Posterior, search: Search, held: Masks) -> _Climb:
    """Maximise by L-BFGS in all free coordinates but those that are held."""
    free = FreeCoordinates(posterior.hyperparameters, search.free)
    optimiser = torch.optim.LBFGS(
        free.leaves,
        max_iter=search.n_steps,
        max_eval=3 * search.n_steps,
        tolerance_grad=search.tolerance,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )
    bounds, last, slopes = search.within(posterior), posterior.hyperparameters.detached(), {}

    def closure() -> Tensor:
        nonlocal last
        optimiser.zero_grad()
        tried = free.value().detached()
        outside = bool(_beyond(bounds, tried, held))
        try:
            loss = -slope_of(search.objective, posterior.at(free.value()))
        except InvalidValue as error:  # no decomposition goes as far as numbers do
            last = tried
            if outside:
                raise _LeftTheDomain from error
            raise
        loss.backward()
        finite = _finite(loss, free)
        last = tried if finite or outside else last
        if not finite:
            raise _LeftTheDomain
        for name, leaf in free.named.items():
            if leaf.grad is not None:
                slopes[name] = -leaf.grad.clone()
                if name in held:
                    leaf.grad.masked_fill_(held[name], 0)
        return loss

    try:
        with torch.inference_mode(False), torch.enable_grad():
            optimiser.step(closure)
            final = -closure().detach()
    except _LeftTheDomain:
        return _Climb(last, math.nan, math.inf, {}, search.n_steps)
    slope = max(float(leaf.grad.abs().max()) for leaf in free.leaves if leaf.grad is not None)
    steps = int(optimiser.state[free.leaves[0]]["n_iter"])
    return _Climb(free.value().detached(), float(final), slope, slopes, steps)


def _beyond(bounds: Bounds, hyper: Hyperparameters, held: Masks) -> Masks:
    """Which entries are at an end of the range or beyond and not held, by name; none left out."""
    found = {name: below | above for name, below, above in bounds.ends(hyper)}
    found = {n: mask & ~held[n] if n in held else mask for n, mask in found.items()}
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def _at_the_ends(
    bounds: Bounds, origin: Hyperparameters, there: Hyperparameters, beyond: Masks
) -> Hyperparameters:
    """An origin whose entries beyond the range stand at the end where they are "there"."""
    moved = {
        name: torch.where(
            mask,
            getattr(there, name).clamp(bounds.low[name], bounds.high[name]),
            getattr(origin, name),
        )
        for name, mask in beyond.items()
    }
    return replace(origin, **moved)


def _leading_back(bounds: Bounds, climb: _Climb, held: Masks, tolerance: float) -> Masks:
    """Which held entries at an end of the range the slope leads back from, by name."""
    found = {}
    for name in held.keys() & climb.slopes.keys():
        inward = bounds.inward(climb.last, name, climb.slopes[name])
        found[name] = held[name] & (inward.abs() > 10 * tolerance)
    return found


def _joined(one: Masks, other: Masks) -> Masks:
    """Entries in either."""
    return {n: _either(one.get(n), other.get(n)) for n in {**one, **other}}


def _either(one: Tensor | None, other: Tensor | None) -> Tensor:
    assert one is not None or other is not None
    if one is None or other is None:
        return other if one is None else one  # type: ignore[return-value]  # not both
    return one | other


class _LeftTheDomain(Exception):
    """An objective or its gradient is not finite; torch's line search would not survive it."""


def _finite(value: Tensor, free: FreeCoordinates) -> bool:
    """Whether an objective, the free coordinates and its gradient in them are finite."""
    grads = [leaf.grad for leaf in free.leaves if leaf.grad is not None]
    return all(bool(t.detach().isfinite().all()) for t in (value, *free.leaves, *grads))


def adam(
    posterior: Posterior, search: Search, *, lr: float, state: Mapping[str, Any] | None
) -> tuple[Hyperparameters, dict[str, Any]]:
    """Some steps of Adam in the free coordinates, from a posterior's hyperparameters.

    Args:
        posterior: start, with cached eigenvalues; no data pass is made.
        search: what to maximise, in how many steps, and how far.
        lr: learning rate, in units of log δ and log σ.
        state: Adam's state after earlier steps, left as it is; None to start anew.

    Returns:
        The hyperparameters after the steps, and Adam's state.

    Raises:
        InvalidValue: the objective or its gradient is not finite on the way.
    """
    start, bounds = posterior.hyperparameters.detached(), search.within(posterior)
    free = FreeCoordinates(start, search.free)
    optimiser = torch.optim.Adam(free.leaves, lr=lr)
    if state is not None:
        optimiser.load_state_dict(copy.deepcopy(dict(state)))
        optimiser.param_groups[0]["lr"] = lr
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(search.n_steps):
            optimiser.zero_grad()
            loss = -slope_of(search.objective, posterior.at(free.value()))
            loss.backward()
            if not _finite(loss, free):
                raise InvalidValue(
                    "the objective or its gradient is not finite",
                    where="objective",
                    got=f"{-float(loss.detach())} at {posterior.at(free.value()).hyperparameters}",
                    remedy="Lower lr_hyp, or keep the objective finite where hyperparameters go",
                )
            for name, leaf in free.named.items():  # what stays gathers no momentum
                if name == "prior_precision" and leaf.grad is not None:
                    leaf.grad.masked_fill_(bounds.stays, 0)
            optimiser.step()
            free.move_to(bounds.inside(free.value().detached(), start))
    return bounds.inside(free.value().detached(), start), optimiser.state_dict()
