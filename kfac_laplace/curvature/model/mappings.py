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
    forward = _asked(model)
    if not _takes_whole(forward, x):
        return _by_entries(model, forward, x)
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


def _asked(model: nn.Module) -> Callable[..., Any]:
    """The forward whose names count: that of the model itself inside wrappers that hand all on.

    Models of peft without a task are such: `forward(*args, **kwargs)` calls `get_base_model()`.
    """
    inside: Any = unwrapped(model)
    if not hasattr(inside, "get_base_model"):
        return inside.forward
    kinds = {p.kind for p in inspect.signature(inside.forward).parameters.values()}
    passes_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return _asked(inside.get_base_model()) if passes_on else inside.forward


def _by_entries(model: nn.Module, forward: Callable[..., Any], x: Mapping[str, Any]) -> Any:
    """What a model returns for entries as keywords, which its signature may not tell to be wrong.

    Raises:
        InvalidType: it fails as one does that takes the mapping as a whole, or a wrapper hands the
            entries on to a model that does not know them.
    """
    try:
        return model(**x)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        whole = _may_want_whole(forward, x, error)
        handed_on = _hands_on(forward) and any(phrase in str(error) for phrase in MISFITS)
        if not whole and not handed_on:
            raise
        raise InvalidType(
            "the model fails on the entries of the mapping by name, as one does that takes the "
            "mapping as a whole"
            if whole
            else "the model does not take the entries of the mapping by name",
            where="x",
            got=f"{list(x)}, and of the model {type(error).__name__}: {error}",
            remedy="Pass forward_fn=lambda model, x: model(x) if it takes the mapping as a whole",
        ) from error


def _hands_on(forward: Callable[..., Any]) -> bool:
    """Whether entries may go to another function, whose names the signature does not tell."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return True
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


#: What Python and torch say of tensors that are taken for mappings.
TAKEN_FOR_MAPPINGS = (
    "invalid data type 'str'",
    "indices must be integers",
    "only integers",
    "object is not a mapping",
    "object has no attribute 'get'",
    "object has no attribute 'items'",
    "object has no attribute 'keys'",
    "object has no attribute 'values'",
)


def _may_want_whole(forward: Callable[..., Any], x: Mapping[str, Any], error: Exception) -> bool:
    """Whether a forward that failed on entries by name could take the mapping as a whole."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False
    in_order = [p for p in parameters if p.kind in IN_ORDER]
    required = [p for p in parameters if p.default is p.empty and p.kind in (*IN_ORDER, *BY_NAME)]
    if not in_order or len(required) > 1 or required not in ([], in_order[:1]):
        return False
    first = in_order[0]
    if first.name not in x or first.kind not in BY_NAME:
        return bool(required) and f"argument: '{first.name}'" in str(error)
    return any(words in str(error) for words in TAKEN_FOR_MAPPINGS)


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
        return one and not _is_entry(required[0], x)
    names = [p.name for p in parameters if p.kind in BY_NAME]
    unknown = [key for key in x if key not in names]
    missing = [p.name for p in required if not _is_entry(p, x)]
    if not unknown and not missing:
        return False
    alone = required or [p for p in parameters if p.kind in IN_ORDER]
    if len(alone) == 1 and alone[0].kind in IN_ORDER and not _is_entry(alone[0], x):
        return True
    names += [f"*{p.name}" for p in parameters if p.kind == inspect.Parameter.VAR_POSITIONAL]
    wrong = [f"does not know {unknown}"] if unknown else []
    wrong += [f"asks for {missing}"] if missing else []
    raise InvalidType(
        "the entries of the mapping are not the arguments of the model's forward",
        where="x",
        got=f"{list(x)}, where forward takes {names}: it {' and '.join(wrong)}",
        remedy=REMEDY,
    )


def _is_entry(parameter: inspect.Parameter, x: Mapping[str, Any]) -> bool:
    """Whether an entry can be handed over as a parameter: one without a name takes none."""
    return parameter.kind in BY_NAME and parameter.name in x
