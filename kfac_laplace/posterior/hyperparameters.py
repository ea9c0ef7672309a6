"""What the evidence is a function of: named values, and the coordinates in which they are tuned.

A further hyperparameter is one more row of `Hyperparameters`: its name, its start, the transform
under which it is free, and the likelihoods that it belongs to.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.model.unchanged import outside_inference
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Likelihood


@dataclass(frozen=True)
class Transform:
    """A bijection from the values of a hyperparameter to all real numbers.

    Args:
        free: value to coordinate.
        value: coordinate to value.
        positive: whether the values are positive numbers, or any.
    """

    free: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    positive: bool = False


#: For what is positive.
LOG = Transform(torch.log, torch.exp, positive=True)


@dataclass(frozen=True)
class Row:
    """What is known of a hyperparameter but its value.

    Args:
        transform: under which it is free, or None where it is never tuned.
        belongs: whether likelihoods have it.
    """

    transform: Transform | None
    belongs: Callable[[Likelihood], bool]


def row(
    transform: Transform | None,
    belongs: Callable[[Likelihood], bool] = lambda _: True,
    start: Tensor | None = None,
) -> Any:
    """A row of `Hyperparameters`, as the default of a dataclass field.

    Args:
        transform: as for `Row`.
        belongs: as for `Row`.
        start: its value where none is given; without a start it has to be given.
    """
    metadata = {"row": Row(transform, belongs)}
    return field(default=MISSING if start is None else start, metadata=metadata)


@dataclass(frozen=True)
class Hyperparameters:
    """What the evidence is a function of; float64 tensors that may carry gradients.

    Args:
        prior_precision: δ, shape () or (length of the prior,).
        sigma_noise: observation noise σ (a standard deviation), shape ().
        temperature: T; low means a concentrated posterior, shape ().
    """

    prior_precision: Tensor = row(LOG)
    sigma_noise: Tensor = row(LOG, lambda likelihood: likelihood.has_noise)
    temperature: Tensor = row(None)

    @classmethod
    def rows(cls) -> dict[str, Row]:
        """The rows by name."""
        return {entry.name: entry.metadata["row"] for entry in fields(cls)}

    @classmethod
    def tuned(cls, likelihood: Likelihood, fixed: Iterable[str] = ()) -> tuple[str, ...]:
        """Names of what the evidence of a likelihood chooses, but for those that are fixed."""
        return tuple(
            name
            for name, known in cls.rows().items()
            if known.transform is not None and known.belongs(likelihood) and name not in fixed
        )

    @classmethod
    def from_state(cls, stored: Mapping[str, Any], device: torch.device) -> Self:
        """Values that a state holds, checked; starts where it lacks one, `KeyError` without."""
        starts: dict[str, Any] = {entry.name: entry.default for entry in fields(cls)}
        found = {}
        for name, known in cls.rows().items():
            if name not in stored and starts[name] is not MISSING:
                found[name] = starts[name].to(device)
                continue
            any_number = known.transform is not None and not known.transform.positive
            check = real if any_number else positive
            found[name] = check(stored[name], name, device)
        return cls(**found)

    def values(self) -> dict[str, Tensor]:
        """The values by name."""
        return {name: getattr(self, name) for name in self.rows()}

    def named(self, likelihood: Likelihood) -> dict[str, Tensor]:
        """Detached copies of what the evidence of a likelihood could choose, by name."""
        return {
            name: value.detach().clone()
            for name, value in self.values().items()
            if name in self.tuned(likelihood)
        }

    def detached(self) -> Self:
        """The same values without their graphs."""
        return replace(self, **{name: value.detach() for name, value in self.values().items()})

    def to(self, device: torch.device) -> Self:
        """The same values on a device."""
        return replace(self, **{name: value.to(device) for name, value in self.values().items()})


class FreeCoordinates:
    """Free hyperparameters as leaves, in the coordinates of their transforms; the rest stays.

    Args:
        start: initial values.
        names: which of them are free.
    """

    def __init__(self, start: Hyperparameters, names: Iterable[str]):
        self._start, rows = start.detached(), start.rows()
        self._transforms: dict[str, Transform] = {}
        self._leaves: dict[str, Tensor] = {}
        with torch.inference_mode(False):
            for name in names:
                transform = rows[name].transform
                assert transform is not None
                coordinate = transform.free(getattr(self._start, name))
                self._transforms[name] = transform
                self._leaves[name] = coordinate.clone().requires_grad_()

    @property
    def leaves(self) -> list[Tensor]:
        """The free tensors."""
        return list(self._leaves.values())

    @property
    def named(self) -> dict[str, Tensor]:
        """The free tensors by name of their hyperparameter."""
        return dict(self._leaves)

    def move_to(self, values: Hyperparameters) -> None:
        """Put the leaves where the values are; those there already stay to the last bit."""
        there = self.value().detached()
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                new, old = getattr(values, name), getattr(there, name)
                leaf.copy_(torch.where(new == old, leaf, self._transforms[name].free(new)))

    def value(self) -> Hyperparameters:
        """All hyperparameters, with gradients towards the leaves."""
        moved = {name: self._transforms[name].value(leaf) for name, leaf in self._leaves.items()}
        return replace(self._start, **moved)


def positive(value: object, where: str, device: torch.device | None = None) -> Tensor:
    """A hyperparameter as a float64 tensor that keeps its graph, checked to be positive.

    Raises:
        InvalidValue: not positive, or so small or large that evidences overflow.
    """
    tensor = real(value, where, device)
    inside = tensor.detach()
    if inside.numel() == 0 or not bool((inside > 0).all()):
        raise InvalidValue(
            "must be positive and finite", where=where, got=value, remedy="Pass a positive number"
        )
    most = MOST.get(where, 1e300)
    if not bool(((inside >= 1 / most) & (inside <= most)).all()):
        raise InvalidValue(
            "too small or too large for float64, in which its square and inverse are taken",
            where=where,
            got=value,
            remedy=f"Pass a number from {1 / most:.0e} to {most:.0e}, or measure in other units",
        )
    return tensor


#: Largest values, and inverses of the smallest: 1/(σ²T) has to be a number.
MOST = {"sigma_noise": 1e100, "temperature": 1e100}


def one_number(tensor: Tensor, where: str) -> Tensor:
    """The tensor as a scalar (), or `InvalidValue`."""
    if tensor.numel() != 1:
        raise InvalidValue(
            "one number is needed",
            where=where,
            got=f"shape {tuple(tensor.shape)}",
            remedy="Pass one finite number",
        )
    return tensor.reshape(())


def real(value: object, where: str, device: torch.device | None = None) -> Tensor:
    """A finite float64 tensor that keeps its graph, usable inside and outside inference mode."""
    try:
        if "complex" in str(getattr(value, "dtype", "")):
            raise TypeError  # torch would drop the imaginary part
        with torch.inference_mode(False):
            tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
            tensor = outside_inference(tensor).clone()  # never the caller's own storage
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidType(
            "not a number or tensor", where=where, got=repr(value), remedy="Pass a real number"
        ) from error
    if not bool(torch.isfinite(tensor.detach()).all()):
        raise InvalidValue("must be finite", where=where, got=value, remedy="Pass a finite number")
    return tensor


def checked_sigma(value: float | Tensor, likelihood: Likelihood, device: torch.device) -> Tensor:
    """σ > 0, float64, shape (), and 1 for likelihoods without noise."""
    sigma = one_number(positive(value, "sigma_noise", device), "sigma_noise")
    if not likelihood.has_noise and float(sigma) != 1.0:
        raise InvalidValue(
            "this likelihood has no observation noise",
            where="sigma_noise",
            got=float(sigma),
            remedy="Leave it out",
        )
    return sigma


def checked_temperature(value: float | Tensor, device: torch.device) -> Tensor:
    """T > 0, float64, shape ()."""
    return one_number(positive(value, "temperature", device), "temperature").detach()
