"""Checks of options that are one of some names, or whole numbers."""

from collections.abc import Collection, Iterable
from numbers import Integral, Real

from kfac_laplace.errors import InvalidType, InvalidValue


def unknown(where: str, got: object, choices: Iterable[object], or_else: str = "") -> InvalidValue:
    """The error for a value that is none of some choices, to be raised by the caller.

    Args:
        where: name of the option.
        got: the value.
        choices: what there is to choose from, in the order in which it is told.
        or_else: what else would do, as it follows "or": "pass a Likelihood".
    """
    named = ", ".join(map(repr, choices))
    remedy = f"Choose one of {named}" + (f", or {or_else}" if or_else else "")
    return InvalidValue("unknown option", where=where, got=repr(got), remedy=remedy)


def check_choice(where: str, value: object, choices: Collection[str], or_else: str = "") -> None:
    """Raise `InvalidValue` unless a value is one of some names; arguments as for `unknown`."""
    if not isinstance(value, str) or value not in choices:
        raise unknown(where, value, choices, or_else)


def check_whole(where: str, value: object, least: int | None = None) -> None:
    """Raise `InvalidType` unless a value is a whole number, `InvalidValue` if it is too small."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidType(
            "not a whole number", where=where, got=repr(value), remedy="Pass an integer"
        )
    if least is not None and value < least:
        raise InvalidValue(f"must be at least {least}", where=where, got=value)


def check_text(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a string."""
    if not isinstance(value, str):
        raise InvalidType("not a string", where=where, got=repr(value), remedy="Pass a string")


def check_iterable(where: str, value: object, what: str = "batches") -> None:
    """Raise `InvalidType` unless a value can be read one after another.

    Args:
        where: name of the argument.
        value: what was passed.
        what: what is wanted of it.
    """
    if not isinstance(value, Iterable):
        remedy = f"Pass a {'DataLoader or a ' if what == 'batches' else ''}list of {what}"
        got = type(value).__name__
        raise InvalidType(f"not an iterable of {what}", where=where, got=got, remedy=remedy)


def check_seed(seed: object) -> None:
    """Raise `InvalidType` or `InvalidValue` unless torch's generators take a seed."""
    check_whole("seed", seed)
    if not -(2**63) <= int(seed) < 2**64:  # type: ignore[call-overload]
        raise InvalidValue("beyond 64 bits", where="seed", got=seed)


def check_number(where: str, value: object) -> float:
    """A value as a float; `InvalidType` unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType("not a number", where=where, got=repr(value), remedy="Pass a number")
    return float(value)


def check_positive(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` unless it is above zero."""
    if not 0 < check_number(where, value) < float("inf"):
        raise InvalidValue("must be positive and finite", where=where, got=value)
