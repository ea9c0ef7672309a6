"""Names of objectives."""

from collections.abc import Callable

from torch import Tensor

from kfac_laplace.errors import InvalidType
from kfac_laplace.options import unknown
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
    if isinstance(choice, str):
        raise unknown("objective", choice, NAMED, "pass a function of a Posterior")
    raise InvalidType(
        "neither a name nor a function",
        where="objective",
        got=repr(choice),
        remedy="Pass a function of a Posterior",
    )
