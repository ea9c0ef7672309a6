"""Checks of the numbers that rules are made of."""

from numbers import Real

from kfac_laplace.errors import InvalidType, InvalidValue


def check_decay(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` unless it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType("not a number", where=where, got=repr(value), remedy="Pass a number")
    if not 0 <= float(value) < 1:
        raise InvalidValue(
            "the decay of an average", where=where, got=value, remedy="Pass one from 0 to below 1"
        )


def check_least_zero(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` if it is below zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType("not a number", where=where, got=repr(value), remedy="Pass a number")
    if not 0 <= float(value) < float("inf"):
        raise InvalidValue("must be finite and not below zero", where=where, got=value)
