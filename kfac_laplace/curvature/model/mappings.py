"""How a model takes a mapping: its entries by name, or all of it as one argument."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from kfac_laplace.curvature.model.unchanged import unwrapped
from kfac_laplace.errors import InvalidType

BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
IN_ORDER = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

#: What Python says of arguments that a function does not take.
MISFITS = ("unexpected keyword argument", "required positional argument", "positional arguments")

REMEDY = (
    "Rename or drop entries (batch_fn), let forward take the mapping as its one named argument, or "
    "pass forward_fn=lambda model, x: model(x)"
)


def of_mapping(model: nn.Module, x: Mapping[str, Any]) -> Any:
    """What a model returns for a mapping: its entries as keywords, or all of it as one argument.

    The second, which is the form of laplace-torch, where the entries do not fit the names of its
    forward, and that asks for one argument which is no entry.

    Args:
        model: the model, perhaps in wrappers.
        x: the mapping.

    Raises:
        InvalidType: neither form fits.
    """
    if not _takes_whole(unwrapped(model).forward, x):
        return _by_entries(model, x)
    try:
        return model(x)
    except (TypeError, AttributeError) as error:
        if type(x).__name__ not in str(error):
            raise
        raise InvalidType(
            "the model takes neither the entries of the mapping by name nor the mapping as a whole",
            where="x",
            got=f"{list(x)}, and of the model {error}",
            remedy=REMEDY,
        ) from error


def _by_entries(model: nn.Module, x: Mapping[str, Any]) -> Any:
    """What a model returns for entries as keywords, which its signature may not tell to be wrong.

    Raises:
        InvalidType: a wrapper hands them on to a model that does not know them.
    """
    try:
        return model(**x)
    except TypeError as error:
        if not any(phrase in str(error) for phrase in MISFITS):
            raise
        raise InvalidType(
            "the model does not take the entries of the mapping by name",
            where="x",
            got=f"{list(x)}, and of the model {error}",
            remedy="Pass forward_fn=lambda model, x: model(x) if it takes the mapping as a whole",
        ) from error


def without(x: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping without an entry, in its own type where that can be."""
    return like(x, {name: value for name, value in x.items() if name != key}) if key in x else x


def like(x: Mapping[str, Any], entries: dict[str, Any]) -> Mapping[str, Any]:
    """Entries in the type of another mapping, where that can be made of them: else a dict.

    A model that takes all of it may ask for entries as attributes.
    """
    if type(x) is dict:
        return entries
    try:
        made = type(x)(entries)  # type: ignore[call-arg]
        same = list(made) == list(entries) and all(made[k] is v for k, v in entries.items())
    except Exception:  # classes of the caller's own raise what they like
        return entries
    return made if same else entries


def _takes_whole(forward: Callable[..., Any], x: Mapping[str, Any]) -> bool:
    """Whether a forward takes a mapping as its one argument, or an error where it takes it not."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind in (*IN_ORDER, *BY_NAME)]
    if any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
        one = len(required) == 1 and required[0].kind in IN_ORDER
        return one and required[0].name not in x
    names = [p.name for p in parameters if p.kind in BY_NAME]
    unknown = [key for key in x if key not in names]
    missing = [p.name for p in required if p.name not in x or p.kind not in BY_NAME]
    if not unknown and not missing:
        return False
    alone = required or [p for p in parameters if p.kind in IN_ORDER]
    if len(alone) == 1 and alone[0].kind in IN_ORDER and alone[0].name not in x:
        return True
    wrong = [f"does not know {unknown}"] if unknown else []
    wrong += [f"asks for {missing}"] if missing else []
    raise InvalidType(
        "the entries of the mapping are not the arguments of the model's forward",
        where="x",
        got=f"{list(x)}, where forward takes {names}: it {' and '.join(wrong)}",
        remedy=REMEDY,
    )
