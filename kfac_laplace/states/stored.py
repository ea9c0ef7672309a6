"""A state as it is read: each value is checked where it stands, and errors name the place."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.states.plain import CHECKSUM

#: Of the states that this version writes and reads.
FORMAT = 5
#: Sizes and counts beyond are those of no model.
LARGEST = 2**48
#: Entries by which the states of each kind are told from the others.
MARKS = {
    "a Laplace posterior": {"mode", "posterior_scale"},
    "a tuner": {"history", "adam"},
    "a curvature": {"ggn", "draws"},
    "a checkpoint of a fit": {"pass", "bound"},
    "a checkpoint of training": {"parts", "made"},
}
REMEDY = "The state is damaged or was changed: use another copy, or fit and save again"


def shown(value: object) -> str:
    """A value of any kind in few words."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # whole numbers of thousands of digits, objects of a user's own
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclass(frozen=True)
class Stored:
    """A value of a state, and its place in it.

    Every method raises `InvalidValue`, naming the place, where the value is of another kind.

    Args:
        value: as it was read.
        where: names on the way to it.
    """

    value: Any
    where: str = "state"

    def fault(self, what: str, got: object = None) -> InvalidValue:
        """The error for a value that is not what it should be, to be raised by the caller."""
        told = shown(self.value) if got is None else got
        return InvalidValue(what, where=self.where, got=told, remedy=REMEDY)

    def fields(self, names: Collection[str]) -> dict[str, "Stored"]:
        """The values of a mapping that has exactly these names."""
        found = self.items()
        if missing := [name for name in names if name not in found]:
            raise self.fault("an entry is missing", f"no {', '.join(missing)}")
        if unknown := [name for name in found if name not in names]:
            raise self.fault("an entry is unknown", ", ".join(map(repr, unknown)))
        return found

    def items(self) -> dict[str, "Stored"]:
        """The values of a mapping by name."""
        if not isinstance(self.value, Mapping):
            raise self.fault("not a mapping")
        if not all(isinstance(name, str) for name in self.value):
            raise self.fault("not a mapping by name", shown([*self.value]))
        return {name: Stored(inner, f"{self.where}.{name}") for name, inner in self.value.items()}

    def entries(self, count: int | None = None) -> list["Stored"]:
        """The values of a list, of a certain length if one is given."""
        if not isinstance(self.value, list | tuple):
            raise self.fault("not a list")
        if count is not None and len(self.value) != count:
            raise self.fault(f"a list of {count} is needed", f"{len(self.value)} entries")
        return [Stored(inner, f"{self.where}[{k}]") for k, inner in enumerate(self.value)]

    def text(self, choices: Collection[str] | None = None) -> str:
        """A string, one of some choices if they are given."""
        if not isinstance(self.value, str):
            raise self.fault("not a string")
        if choices is not None and self.value not in choices:
            raise self.fault(f"none of {', '.join(map(repr, choices))}")
        return self.value

    def texts(self) -> tuple[str, ...]:
        """Strings that differ from one another."""
        found = tuple(entry.text() for entry in self.entries())
        if len({*found}) < len(found):
            raise self.fault("a name stands here twice")
        return found

    def flag(self) -> bool:
        """True or False."""
        if not isinstance(self.value, bool):
            raise self.fault("neither True nor False")
        return self.value

    def whole(self, least: int = 0, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self.fault("not a whole number")
        if not least <= self.value <= most:
            raise self.fault(f"a whole number from {least} to {most} is needed")
        return self.value

    def wholes(self, least: int = 0) -> tuple[int, ...]:
        """Whole numbers that are no less than `least`."""
        return tuple(entry.whole(least) for entry in self.entries())

    def number(self) -> float:
        """A number, which may be no finite one."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.fault("not a number")
        return self.value

    def count(self) -> float:
        """How many: a finite number ≥ 0, whole but for data that were weighted."""
        found = self.number()
        if not 0 <= found <= LARGEST or not isfinite(found):
            raise self.fault("a count is a finite number ≥ 0")
        return found

    def tensor(self, shape: tuple[int, ...] | None = None, *, finite: bool = True) -> Tensor:
        """A real floating-point tensor without a graph, of a certain shape if one is given."""
        value = self.value
        if not isinstance(value, Tensor):
            raise self.fault("not a tensor")
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            raise self.fault("not an ordinary tensor")
        if not value.is_floating_point():
            raise self.fault("not a tensor of real numbers")
        if shape is not None and value.shape != shape:
            raise self.fault(f"shape {tuple(shape)} is needed", tuple(value.shape))
        value = value.detach()
        if bool(value.isnan().any()) or (finite and not bool(value.isfinite().all())):
            raise self.fault("not finite", f"{int((~value.isfinite()).sum())} such entries")
        return value


def opened(
    state: object, names: Collection[str], kind: str, *later: Mapping[str, object]
) -> dict[str, Stored]:
    """The entries of a state of ours, whose format is that of this version.

    Args:
        state: what is to be read.
        names: of its entries, beside its format and its checksum.
        kind: what it is the state of: "a Laplace posterior".
        later: entries that states of this format had not from the start, in the order in which
            they came: those that came together, with what they are where all of them are absent.

    Raises:
        InvalidValue: not such a state, or one of another version.
    """
    others = {known: marks for known, marks in MARKS.items() if known != kind}
    if isinstance(state, Mapping) and not MARKS.get(kind, set(names)) & state.keys():
        for other, marks in others.items():
            if marks <= state.keys():
                raise InvalidValue(
                    f"not the state of {kind}",
                    where="state",
                    got=f"the state of {other}",
                    remedy=f"Let {other} read it, or pass what {kind} saved",
                )
    if not isinstance(state, Mapping) or len({*names, "format"} & {*state}) < 2:
        got = shown(sorted(map(str, state))) if isinstance(state, Mapping) else shown(state)
        remedy = "Pass what state_dict() or save() made"
        raise InvalidValue(f"not the state of {kind}", where="state", got=got, remedy=remedy)
    if "format" in state:
        _check_format(Stored(state["format"], "state.format"))
    for added in later:
        if added.keys().isdisjoint(state):
            state = {**state, **added}
        names = (*names, *added)
    return Stored(state).fields((*names, "format", CHECKSUM))


def _check_format(stored: Stored) -> None:
    """Raise `InvalidValue` for a format that this version does not read."""
    number = stored.whole()
    if number > FORMAT:
        what, remedy = "newer", "Update kfac_laplace, or save it again with this version"
    else:
        what, remedy = "older", "Fit and save again with this version"
    if number != FORMAT:
        raise InvalidValue(
            f"the state was made by a {what} version of kfac_laplace",
            where=stored.where,
            got=f"format {number}, where this version reads format {FORMAT}",
            remedy=remedy,
        )


@contextmanager
def refusing_damage(where: str = "state") -> Iterator[None]:
    """Turn what a damaged state does to its reader into `InvalidValue`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, KfacLaplaceError):
            raise
        raise InvalidValue(
            "a damaged state", where=where, got=shown(error), remedy=REMEDY
        ) from error
