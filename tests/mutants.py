"""States with one value changed each: what a damaged file, or an edited one, may hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Entry(Enum):
    """What no state holds."""

    GONE = "gone"


#: Stands for an entry that is taken away.
GONE = Entry.GONE
#: What no entry is, or few are.
ANYTHING = (
    None,
    "x",
    -1,
    2.5,
    float("nan"),
    10**30,
    True,
    [],
    {"a": 1},
    [[1]],
    torch.tensor(float("nan")),
    torch.zeros(2, 3),
    torch.zeros(2, dtype=torch.long),
    torch.zeros(2).to_sparse(),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value, mappings and lists included."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list | tuple):
        for k in range(len(value)):
            yield from places(value[k], (*path, k))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def with_value(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a state with another value at a place."""
    changed = list(state) if isinstance(state, tuple) else copy.copy(state)
    if len(path) > 1:
        changed[path[0]] = with_value(changed[path[0]], path[1:], value)
    elif value is GONE:
        del changed[path[0]]
    else:
        changed[path[0]] = value
    return changed


def changes(value: Any) -> Iterator[Any]:
    """Other values where there was one."""
    yield GONE
    yield from ANYTHING
    if isinstance(value, Tensor):
        yield value[None]
        yield value.flatten()[:0]
        yield value.long() if value.is_floating_point() else value.double()
        if value.is_floating_point():
            yield from (value * float("nan"), -value - 1, value * 1e30 + 1e30, value.float())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (-value - 1, value + 1, value + 0.5, value * 10**9, float(value))
    elif isinstance(value, str):
        yield value + "y"
    elif isinstance(value, dict):
        yield {**value, "more": 1}
    elif isinstance(value, list):
        yield from (value[:-1], value + value[:1], value[::-1])


def mutants(state: Any, every: int = 1) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """Place, new value and changed state; one in `every` of them."""
    number = 0
    for path in places(state):
        for value in changes(at(state, path)):
            number += 1
            if number % every == 0:
                yield path, value, with_value(state, path, value)
