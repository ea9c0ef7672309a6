"""Options that say something by name: {pattern of parameter names: value}."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from kfac_laplace.errors import InvalidType, InvalidValue

Value = TypeVar("Value")


def by_name(patterns: Mapping[str, Value], names: Iterable[str], where: str) -> dict[str, Value]:
    """The value of each name, that of the first pattern it fits.

    Args:
        patterns: globs to values.
        names: parameter names.
        where: the option, for messages.

    Raises:
        InvalidValue: a pattern that fits no name, or a name that fits no pattern.
    """
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidType(
                "not a pattern", where=where, got=repr(pattern), remedy="Pass a string"
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidValue(
                "pattern matches no parameter",
                where=where,
                got=repr(pattern),
                remedy=f"The parameters are {names}",
            )
    found = {
        name: next(p for p in patterns if fnmatchcase(name, p))
        for name in names
        if any(fnmatchcase(name, p) for p in patterns)
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise InvalidValue(
            "no pattern matches this parameter",
            where=where,
            got=repr(missing[0]),
            remedy="Add a last pattern '*' for all the others",
        )
    return {name: patterns[found[name]] for name in names}
