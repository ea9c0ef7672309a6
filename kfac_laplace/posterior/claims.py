"""What a search for hyperparameters found that should not be believed unread, each said once."""

import logging
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kfac_laplace.posterior.bounds import REACH, Bounds
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.dual import DualEvidence

log = logging.getLogger("kfac_laplace")

#: Share of the directions that the data can determine from which γ is no count of them.
NEARLY_ALL = 0.9
#: A squared noise may exceed the targets' variance by this over their number: what chance does.
LEEWAY = 5.0
#: Log-likelihoods within this of each other, beside their size, are the same.
ROUNDING = 1e-9
#: Rounds in which a tuner's network may not have learned anything.
EARLY = 4
#: Rounds after which a tuner's network should have learned something.
LATE = 10


class Claim(NamedTuple):
    """One thing to say.

    Args:
        kind: what it is about.
        names: of the groups it is about; empty where it is about all.
        text: the message.
    """

    kind: str
    names: tuple[str, ...]
    text: str


def tell(found: Iterable[Claim], said: set[tuple[str, str]]) -> None:
    """Log the claims that were not said before, and note in `said` those that are now."""
    for claim in found:
        keys = {(claim.kind, name) for name in claim.names or ("",)}
        if keys - said:
            log.warning(claim.text)
            said |= keys


def claims(posterior: Posterior, bounds: Bounds) -> Iterator[Claim]:
    """What to say of the hyperparameters that a search found.

    Args:
        posterior: at these hyperparameters.
        bounds: how far the search could go.
    """
    yield from _without_maximum(posterior.apart_from_unused, bounds)
    yield from _beyond_the_data(posterior, bounds)
    if "sigma_noise" in bounds.high:
        yield from _beyond_the_spread(posterior)


def round_claims(posterior: Posterior, bounds: Bounds, rounds: int, moved: int) -> Iterator[Claim]:
    """What to say after a round of a tuner, whose network may still be far from trained.

    Args:
        posterior: at the hyperparameters of the round.
        bounds: how far its steps could go.
        rounds: how many rounds there were.
        moved: how many of these moved hyperparameters.
    """
    yield from _without_maximum(posterior.apart_from_unused, bounds)
    yield from _beyond_the_data(posterior, bounds)
    if "sigma_noise" in bounds.high and (rounds >= LATE or _taken_back(posterior, bounds)):
        yield from _beyond_the_spread(posterior)
    yield from _no_better_than_a_constant(posterior, rounds)
    if moved >= LATE:
        yield from _below_a_constant(posterior)


def waiting_claims(
    posterior: Posterior, bounds: Bounds, rounds: int, moved: int
) -> Iterator[Claim]:
    """What to say after a round in which precisions wait: arguments as for `round_claims`."""
    yield from _no_better_than_a_constant(posterior, rounds)


def _below_a_constant(posterior: Posterior) -> Iterator[Claim]:
    """A trained network whose evidence is below that of a prediction that knows no input."""
    constant = posterior.constant_evidence
    if not math.isfinite(constant):
        return
    temperature = float(posterior.hyperparameters.temperature)
    fit = float(posterior.log_likelihood) / temperature
    evidence = float(posterior.apart_from_unused.log_marginal_likelihood)
    if fit > constant > evidence:
        yield Claim(
            "trust",
            (),
            f"the evidence, {evidence:.6g}, is below that of a constant prediction, "
            f"{constant:.6g}, though the network predicts better, {fit:.6g}: log-determinants, not "
            "data, choose the precisions. Compare with held-out data before trusting them",
        )


def _no_better_than_a_constant(posterior: Posterior, rounds: int) -> Iterator[Claim]:
    """A network that predicts as a constant does, or worse, when it should have learned."""
    ggn, temperature = posterior.ggn, float(posterior.hyperparameters.temperature)
    constant = ggn.likelihood.constant_log_likelihood(ggn.targets)
    if not math.isfinite(constant) or rounds <= EARLY:
        return
    fit, gamma, outputs = float(posterior.log_likelihood), _gamma(posterior), len(ggn.targets[0])
    if fit > constant + ROUNDING * abs(constant):
        return
    if gamma > outputs and rounds < LATE:  # more directions than a constant has
        return
    evidence, nothing = float(posterior.log_marginal_likelihood), constant / temperature
    held = _held_down(posterior)
    remedy = (
        f"The prior outweighs the data in {held}: begin anew with a smaller prior_precision or a "
        "longer n_epochs_burnin, unless there is nothing to learn"
        if held
        else "Train further, and look at the scale of the data, unless there is nothing to learn"
    )
    yield Claim(
        "dead",
        (),
        f"the network predicts no better than a constant: log-likelihood {fit:.6g}, the best "
        f"constant's {constant:.6g}; evidence {evidence:.6g}, "
        f"{'below' if evidence < nothing else 'near'} the constant predictor's {nothing:.6g}. "
        f"The data determine {gamma:.2g} of its directions. {remedy}",
    )


def _without_maximum(posterior: Posterior, bounds: Bounds) -> Iterator[Claim]:
    """What stayed or sits at the end of its range, and why: by γ and δ‖θ − μ‖², not by the way."""
    none, little = "the evidence has no maximum in", "the evidence has next to nothing to gain by"
    reasons, noise = [(none, bounds.blind, "no data determine it (no curvature), it stays")], ""
    if "prior_precision" in bounds.high and bounds.of_evidence:
        still, squares = bounds.without_gain(posterior), posterior.squares
        with torch.no_grad():
            pull = posterior.hyperparameters.prior_precision * squares
            near = bounds.gamma(posterior) >= pull
        reasons += [
            (none, still & (squares == 0), "its mode equals the prior mean"),
            (little, still & near & (squares > 0), "its mode nearly equals the prior mean"),
            (little, still & ~near, "hardly any data determine it"),
        ]
    for name, below, above in bounds.ends(posterior.hyperparameters):
        if name == "prior_precision" and not bounds.of_evidence:
            met = (below | above) & ~bounds.stays
            reasons.append(("the search met the end of its range in", met, "call again"))
        elif name != "prior_precision" and bool(below | above):
            noise = _noise_at_an_end(posterior, name, bool(above))
    told = [(kind, _groups_of(posterior, m), why) for kind, m, why in reasons if bool(m.any())]
    deltas = posterior.prior.full(posterior.hyperparameters.prior_precision.detach())
    where = [f", δ = {float(deltas[m].max()):.3g}" for _, m, _ in reasons if bool(m.any())]
    parts = [
        f"{kind} the prior precision of {_listed(of)}: {why}{at}"
        for (kind, of, why), at in zip(told, where, strict=True)
    ]
    parts += [noise] if noise else []
    if parts:
        names = tuple(name for _, of, _ in told for name in of) + ("noise",) * bool(noise)
        yield Claim("bounds", names, "; ".join(parts))


def _noise_at_an_end(posterior: Posterior, name: str, above: bool) -> str:
    """What to say of a noise at an end of its range; nothing of one at the spread of the targets.

    Of that `_beyond_the_spread` tells where it is news.
    """
    ggn, sigma = posterior.ggn, float(getattr(posterior.hyperparameters, name))
    gaussian = ggn.likelihood.has_gaussian_noise
    if gaussian and above and sigma >= ggn.likelihood.target_spread(ggn.targets):
        return ""
    if gaussian and not above and float(ggn.statistic) <= ggn.n_outputs * sigma**2:
        why = "the residuals are nearly zero"
        return f"the evidence has no maximum in {name}: {why}, stopped at {sigma:.3g}"
    return f"the search met the end of its range in {name}, {sigma:.3g}"


def _beyond_the_data(posterior: Posterior, bounds: Bounds) -> Iterator[Claim]:
    """γ near the number of directions that the data can determine, where it is no exact count."""
    if isinstance(bounds.dimensions, DualEvidence):  # whose γ is one, and chose all that moved
        return
    ggn, structure = posterior.ggn, posterior.ggn.options.structure
    noise = "sigma_noise" in bounds.high
    gamma, possible = _gamma(posterior), ggn.likelihood.determined(ggn.targets, ggn.n_outputs)
    if posterior.ggn.options.one_block or not gamma > NEARLY_ALL * possible:
        return
    fix = "fix_sigma_noise=True, " if noise else ""
    yield Claim(
        "gamma",
        (),
        f"'{structure}' curvature claims that the data determine "
        f"{gamma:.6g} directions, where {possible:.6g} are possible: evidence, precisions"
        f"{' and noise' if noise else ''} rest on no count of degrees of freedom. Take fewer "
        f"weights (subset_of_weights), hessian_structure='full', {fix}or calibrate(val_loader, "
        "method='validation')",
    )


def _taken_back(posterior: Posterior, bounds: Bounds) -> bool:
    """Whether a Gaussian noise has risen by what γ takes back of a good fit.

    Large residuals are no news while a network begins, nor is a noise on its way down.
    """
    ggn, sigma = posterior.ggn, float(posterior.hyperparameters.sigma_noise)
    if not ggn.likelihood.has_gaussian_noise:
        return False
    risen = sigma > float(bounds.high["sigma_noise"]) / REACH
    return risen and sigma**2 * ggn.n_outputs > 2 * float(ggn.statistic)


def _beyond_the_spread(posterior: Posterior) -> Iterator[Claim]:
    """A noise beyond the spread of the targets."""
    ggn, sigma = posterior.ggn, float(posterior.hyperparameters.sigma_noise)
    spread = ggn.likelihood.target_spread(ggn.targets)
    if not spread > 0 or sigma**2 <= spread**2 * (1 + LEEWAY / ggn.n_outputs):
        return
    left = math.sqrt(float(ggn.statistic) / ggn.n_outputs)
    full = "" if ggn.options.one_block else " or hessian_structure='full'"
    yield Claim(
        "noise",
        (),
        f"sigma_noise={sigma:.3g} is beyond the spread of the targets, {spread:.3g}; that of the "
        f"residuals is {left:.3g}. Train the model further where that is large; otherwise the "
        "curvature claims more directions than the data have: use fix_sigma_noise=True, fewer "
        f"weights (subset_of_weights){full}",
    )


def _gamma(posterior: Posterior) -> float:
    with torch.no_grad():
        return float(posterior.effective_dimensions().sum())


def _held_down(posterior: Posterior, count: int = 3) -> str:
    """The groups of largest precisions among those of which data determine no direction."""
    with torch.no_grad():
        deltas = posterior.prior.by_group(posterior.hyperparameters.prior_precision)
        gammas = posterior.effective_dimensions()
    index = posterior.prior.index
    held = {
        name: float(delta.max())
        for name, delta in deltas.items()
        if float(gammas[index[name].flatten().unique()].sum()) < 1
    }
    order = sorted(held, key=held.__getitem__, reverse=True)
    return ", ".join(f"{name} ({held[name]:.3g})" for name in order[:count])


def _groups_of(posterior: Posterior, mask: Tensor) -> dict[str, tuple[int, int]]:
    """Groups with a precision in a mask: how many of how many are in it."""
    index = posterior.prior.index.items()
    own = {name: mask[places.flatten().unique()] for name, places in index}
    return {name: (int(part.sum()), len(part)) for name, part in own.items() if part.any()}


def _listed(groups: dict[str, tuple[int, int]], most: int = 20) -> str:
    """Names of groups, with how many of their precisions where it is some of several."""
    names = [
        name + (f" ({some} of {count})" if some < count else "")
        for name, (some, count) in groups.items()
    ]
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
