"""Whether data are those of the fit, as far as their targets tell."""

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.calibrate.held_out import HeldOut
from kfac_laplace.posterior.gaussian import Posterior

#: Relative, of float64 sums in another order.
ROUNDING = 1e-9


def check_same_targets(posterior: Posterior, sums: Sequence[Tensor]) -> None:
    """Raise `InvalidValue` unless sums over targets are those of the fit, up to rounding.

    Args:
        posterior: the fitted one; likelihoods without such sums are not checked.
        sums: `Likelihood.target_sums` of the parts of the data.
    """
    # Not the likelihood's statistic: loaders that augment at random yield other inputs each time,
    # and with them other outputs, for the same targets.
    if not _same_targets(posterior, sums):
        raise other_data("as many examples, with other targets")


def likeness(posterior: Posterior, points: HeldOut) -> Literal["data", "targets", ""]:
    """What points, predicted by a posterior, have in common with the data of its fit.

    Args:
        posterior: the fitted one.
        points: outputs and targets.

    Returns:
        "data": as many examples, the same sums over targets, and the same log-likelihood; "targets"
        without the last; "" otherwise, and for likelihoods without such sums.
    """
    ggn = posterior.ggn
    parts = (points, *points.others)
    if not ggn.targets.numel() or points.n != ggn.n_data:
        return ""
    likelihood = ggn.likelihood
    if not _same_targets(posterior, [likelihood.target_sums(p.target, p.mean) for p in parts]):
        return ""
    found = torch.stack([likelihood.statistic(p.mean, p.target) for p in parts]).sum(0)
    stored = ggn.statistic.to(found)
    if found.shape != stored.shape:
        return "targets"
    # Outputs of another batch size or precision are others in their last digits.
    return "data" if torch.allclose(found, stored, rtol=1e-4, atol=1e-6) else "targets"


def _same_targets(posterior: Posterior, sums: Sequence[Tensor]) -> bool:
    """Whether sums over targets are those of the fit; True for likelihoods without."""
    stored = posterior.ggn.targets
    if not stored.numel():
        return True
    likelihood, parts = posterior.ggn.likelihood, [part.to(stored.device) for part in sums]
    if any(part.shape != stored.shape for part in parts):  # outputs of several widths
        stored, *parts = (likelihood.pooled_sums(part) for part in (stored, *parts))
    total = reduce(likelihood.joined_sums, parts)
    double = all(value.dtype == torch.float64 for value in posterior.mode_for_model.values())
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    # Targets are rounded to the outputs' precision, which is float32 at the least: that moves sums
    # by so much of themselves, and of what their largest terms are.
    size = stored.abs() + (stored[0] * stored[-1]).abs().sqrt() * (1 + stored.abs().amin(0))
    return not bool(((total - stored).abs() > (4 * eps + ROUNDING) * size).any())


def other_data(got: str) -> InvalidValue:
    """The error for other data than those of the fit, to be raised by the caller."""
    return InvalidValue(
        "leave-one-out needs the data of the fit, all of them",
        where="loader",
        got=got,
        remedy="Pass the training loader (a generator can be read only once; one that samples, or "
        "shuffles under drop_last, yields other examples each time), or use method='validation'",
    )
