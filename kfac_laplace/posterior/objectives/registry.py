"""Names of objectives, and what an objective is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import unknown
from kfac_laplace.posterior.gaussian import Posterior

#: In nats over the whole data, differentiable in `posterior.hyperparameters`.
Objective = Callable[[Posterior], Tensor]


@dataclass(frozen=True)
class Data:
    """Training data for objectives that look at them once more.

    Args:
        loaders: as `fit` read them, one after another.
        key_y: name of the targets where batches are mappings.
        seed: seed of what is drawn.
    """

    loaders: tuple[Iterable[Any], ...]
    key_y: str
    seed: int

    def batches(self) -> Iterable[Any]:
        """All batches.

        Raises:
            InvalidValue: there is no loader.
        """
        if not self.loaders:
            raise InvalidValue(
                "this objective needs the training data once more",
                where="objective",
                got="no loader, as after loading a file or a fit of parts over ranks",
                remedy="Pass loader=, all of the training data, or use objective='kron'",
            )
        return (batch for loader in self.loaders for batch in loader)

    def kept(self) -> "Data":
        """The same, to be read more than once: what can be read only once, as a list."""
        loaders = (list(each) if isinstance(each, Iterator) else each for each in self.loaders)
        return replace(self, loaders=tuple(loaders))


@runtime_checkable
class DataObjective(Protocol):
    """What becomes an objective by a pass over the training data."""

    #: Whether what it becomes is an evidence, `CountsDimensions`.
    evidence: bool

    def on(self, posterior: Posterior, data: Data) -> Objective:
        """The objective of a posterior's expansion, at any hyperparameters."""


@runtime_checkable
class CountsDimensions(Protocol):
    """What an evidence knows beside its value; bounds and fixed points rest on it."""

    def curvature(self, posterior: Posterior) -> Tensor:
        """Σ H_kk over the entries that share a precision, at σ = T = 1, (length of the prior,)."""

    def effective_dimensions(self, posterior: Posterior) -> Tensor:
        """γ by shared precision, (length of the prior,)."""


AnyObjective = Objective | DataObjective
NAMED: dict[str, AnyObjective] = {}


def objective(*names: str) -> Callable[[Objective], Objective]:
    """Register an objective under names that options may give.

    Args:
        names: as in `optimize_prior(objective="...")`.
    """

    def register(function: Objective) -> Objective:
        NAMED.update(dict.fromkeys(names, function))
        return function

    return register


def resolve_objective(choice: str | AnyObjective) -> AnyObjective:
    """The objective of a name, or the function itself.

    Raises:
        InvalidValue: an unknown name.
        InvalidType: neither a name nor a function.
    """
    if isinstance(choice, str) and choice in NAMED:
        return NAMED[choice]
    if callable(choice) or isinstance(choice, DataObjective):
        return choice
    if isinstance(choice, str):
        raise unknown("objective", choice, NAMED, "pass a function of a Posterior")
    raise InvalidType(
        "neither a name nor a function",
        where="objective",
        got=repr(choice),
        remedy="Pass a function of a Posterior",
    )


def on_data(choice: AnyObjective, posterior: Posterior, data: Data) -> Objective:
    """An objective as a function of a posterior, after its pass over the data if it makes one.

    Args:
        choice: what `resolve_objective` gave.
        posterior: at its mode.
        data: its training data.
    """
    return choice.on(posterior, data) if isinstance(choice, DataObjective) else choice
