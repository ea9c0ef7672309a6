"""Whether data are those of the fit, as far as their targets tell."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
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
    stored = posterior.ggn.targets
    if not stored.numel():
        return
    likelihood, parts = posterior.ggn.likelihood, [part.to(stored.device) for part in sums]
    if any(part.shape != stored.shape for part in parts):  # outputs of several widths
        stored, *parts = (likelihood.pooled_sums(part) for part in (stored, *parts))
    total = reduce(likelihood.joined_sums, parts)
    double = all(value.dtype == torch.float64 for value in posterior.mode_for_model.values())
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    # Targets are rounded to the outputs' precision, which is float32 at the least: that moves sums
    # by so much of themselves, and of what their largest terms are.
    size = stored.abs() + (stored[0] * stored[-1]).abs().sqrt() * (1 + stored.abs().amin(0))
    if bool(((total - stored).abs() > (4 * eps + ROUNDING) * size).any()):
        raise other_data("as many examples, with other targets")


def other_data(got: str) -> InvalidValue:
    """The error for other data than those of the fit, to be raised by the caller."""
    return InvalidValue(
        "leave-one-out needs the data of the fit, all of them",
        where="loader",
        got=got,
        remedy="Pass the training loader (a generator can be read only once; one that samples, or "
        "shuffles under drop_last, yields other examples each time), or use method='validation'",
    )
