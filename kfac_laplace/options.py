"""Checks of options that are one of some names, or whole numbers."""

from collections.abc import Sequence
from numbers import Integral, Real

from kfac_laplace.errors import InvalidType, InvalidValue


def check_choice(where: str, value: object, choices: Sequence[str]) -> None:
    """Raise `InvalidValue` unless a value is one of some names."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidValue(
            "unknown option", where=where, got=repr(value), remedy=f"Choose one of {choices}"
        )


def check_whole(where: str, value: object, least: int | None = None) -> None:
    """Raise `InvalidType` unless a value is a whole number, `InvalidValue` if it is too small."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidType(
            "not a whole number", where=where, got=repr(value), remedy="Pass an integer"
        )
    if least is not None and value < least:
        raise InvalidValue(f"must be at least {least}", where=where, got=value)


def check_positive(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` unless it is above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType("not a number", where=where, got=repr(value), remedy="Pass a number")
    if not 0 < float(value) < float("inf"):
        raise InvalidValue("must be positive and finite", where=where, got=value)
