"""Names of objectives."""

from collections.abc import Callable

from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.posterior.gaussian import Posterior

Objective = Callable[[Posterior], Tensor]
NAMED: dict[str, Objective] = {}


def objective(*names: str) -> Callable[[Objective], Objective]:
    """Register an objective under names that options may give.

    Args:
        names: as in `optimize_prior(objective="...")`.
    """

    def register(function: Objective) -> Objective:
        NAMED.update(dict.fromkeys(names, function))
        return function

    return register


def resolve_objective(choice: str | Objective) -> Objective:
    """The objective of a name, or the function itself.

    Raises:
        InvalidValue: an unknown name.
        InvalidType: neither a name nor a function.
    """
    if isinstance(choice, str) and choice in NAMED:
        return NAMED[choice]
    if callable(choice):
        return choice
    kind = InvalidValue if isinstance(choice, str) else InvalidType
    raise kind(
        "unknown objective",
        where="objective",
        got=repr(choice),
        remedy=f"Choose one of {sorted(NAMED)}, or pass a function of a Posterior",
    )
