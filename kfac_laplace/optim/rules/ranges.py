"""Checks of the numbers that rules are made of."""

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_number


def check_decay(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` unless it is in [0, 1)."""
    if not 0 <= check_number(where, value) < 1:
        raise InvalidValue(
            "the decay of an average", where=where, got=value, remedy="Pass one from 0 to below 1"
        )


def check_least_zero(where: str, value: object) -> None:
    """Raise `InvalidType` unless a value is a number, `InvalidValue` if it is below zero."""
    if not 0 <= check_number(where, value) < float("inf"):
        raise InvalidValue("must be finite and not below zero", where=where, got=value)
