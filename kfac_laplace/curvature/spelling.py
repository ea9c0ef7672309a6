"""Signatures that name every keyword, and an answer to those that a function does not have."""

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from kfac_laplace.curvature.options import CurvatureKeywords, CurvatureOptions
from kfac_laplace.errors import InvalidType

Callee = TypeVar("Callee", bound=Callable[..., Any])


def spelled(function: Callee) -> Callee:
    """Let the keywords that `**options` stands for be shown by `help`, and check their names."""
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    for option in fields(CurvatureOptions):
        if option.name in signature.parameters or option.name == "likelihood":
            continue
        default = "exact" if option.name == "fisher" else option.default
        annotation = CurvatureKeywords.__annotations__[option.name]
        kind = inspect.Parameter.KEYWORD_ONLY
        shown.append(inspect.Parameter(option.name, kind, default=default, annotation=annotation))
    checked = _checking(function, [parameter.name for parameter in shown])
    checked.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return checked


def suggesting(function: Callee) -> Callee:
    """Let a keyword that a function does not have be answered with the one that was meant."""
    return _checking(function, list(inspect.signature(function).parameters))


def _checking(function: Callee, names: list[str]) -> Callee:
    """The function with an error of ours for keywords that are none of some names."""
    names = [name for name in names if name != "self"]
    placed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        if len(args) > len(placed):
            known = [name for name in placed if name != "self"]
            raise InvalidType(
                f"takes {len(known)} values by position, {', '.join(known)}",
                where=function.__qualname__,
                got=f"{args[len(placed)]!r} behind them",
                remedy="Write the rest by name, as name=value",
            )
        for name in keywords.keys() - set(names):
            alike = difflib.get_close_matches(name, names, 1)
            raise InvalidType(
                "no such keyword",
                where=function.__qualname__,
                got=repr(name),
                remedy=f"Perhaps {alike[0]} was meant" if alike else f"Choose from {names}",
            )
        return function(*args, **keywords)

    return checked  # type: ignore[return-value]
