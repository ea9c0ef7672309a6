"""Walking through what modules hold: containers and objects of the model's own, and their entries.

Behind an attribute may be a whole program. Python modules, classes, functions, and objects of the
standard library are never entered; entries are read and written past methods of the caller's own,
which may refuse, or do more; and nothing is written to but where it differs from what it was.
"""

import sys
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Iterable
from types import (
    BuiltinFunctionType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

#: Kinds in which there is nothing to look for.
PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size})
#: Those whose entries are entries of a model's; OrderedDict before dict, which it is one of.
KINDS: tuple[Any, ...] = (list, tuple, OrderedDict, dict, deque, set, frozenset)
#: What is never entered.
CODE = (ModuleType, type, FunctionType, BuiltinFunctionType, MethodType)
#: Names by which the globals of a module are known.
SCOPE = ("__builtins__", "__spec__")
#: The standard library's that hold attributes as a user's do.
OBJECTS = (SimpleNamespace, UserDict, UserList)
#: Containers are followed so deep, where objects of other classes count twice: behind them may be
#: a whole program. Those of more entries hold data rather than activations; and so many values are
#: looked at, those near the module first.
DEPTH, ENTRIES, MOST = 8, 10_000, 100_000


def is_plain(value: Any) -> bool:
    """Whether there is nothing to look for in a value, as in most attributes of most layers."""
    kind = type(value)
    if kind is tuple:
        return all(type(part) in PLAIN for part in value)
    return kind in PLAIN


def within(values: Iterable[Any], seen: set[int]) -> list[Any]:
    """The tensors, arrays and containers among values, and those inside of these.

    Args:
        values: where to begin.
        seen: identities of containers not to enter; those entered are added.
    """
    found: list[Any] = []
    queue = deque((value, DEPTH) for value in values)
    looked = len(queue)
    while queue:
        value, depth = queue.popleft()
        if isinstance(value, Tensor | np.ndarray):
            found.append(value)
        elif depth > 0 and id(value) not in seen and _is_container(value):
            seen.add(id(value))
            found.append(value)
            depth -= 2 if _kind(value) is None and not isinstance(value, nn.Module) else 1
            parts = [(part, depth) for part in _parts(value) if not is_plain(part)]
            looked += len(parts)
            if looked <= MOST:
                queue.extend(parts)
    return found


def places(container: Any) -> "list[Place]":
    """Where a container has entries by key that can change: its own, attributes, and slots."""
    found: list[Place] = []
    kind = _kind(container)
    if kind is dict or kind is OrderedDict:
        found.append(Place(container, kind))
    attributes = _attributes(container)
    if attributes is not None:
        found.append(Place(attributes, dict))
    if kind is None:
        slots = _slots(container)
        if slots:
            found.append(Slots(container, slots))
    return found


class Place:
    """The entries of a mapping, past methods of a subclass.

    Args:
        entries: the mapping.
        kind: dict or OrderedDict.
        skipped: keys that are not ours to look at.
    """

    def __init__(self, entries: Any, kind: Any = dict, skipped: frozenset[str] = frozenset()):
        self._entries, self._kind, self._skipped = entries, kind, skipped

    def now(self) -> dict[Any, Any]:
        """A copy of the entries."""
        items = self._kind.items(self._entries)
        if not self._skipped:
            return dict(items)
        return {key: value for key, value in items if key not in self._skipped}

    def put(self, key: Any, value: Any) -> None:
        """Set one entry."""
        self._kind.__setitem__(self._entries, key, value)

    def remove(self, key: Any) -> None:
        """Delete one entry."""
        self._kind.__delitem__(self._entries, key)

    def put_back(self, before: dict[Any, Any]) -> None:
        """Entries as they were, in the same order; those that are the same objects are not touched.

        Args:
            before: what `now` gave then.
        """
        now = self.now()
        for key in [key for key in now if key not in before]:
            self.remove(key)
            del now[key]
        for key, value in before.items():
            if key not in now or now[key] is not value:
                self.put(key, value)
        if not _same(list(self.now()), list(before)):
            for key, value in before.items():
                self.remove(key)
                self.put(key, value)


class Slots(Place):
    """The values of an object's slots.

    Args:
        owner: the object.
        slots: its members by name.
    """

    def __init__(self, owner: Any, slots: dict[str, Any]):
        super().__init__({})
        self._owner, self._slots = owner, slots

    def now(self) -> dict[Any, Any]:
        """Values of the slots that have one."""
        found = {}
        for name, slot in self._slots.items():
            try:
                found[name] = slot.__get__(self._owner)
            except AttributeError:
                continue
        return found

    def put(self, key: Any, value: Any) -> None:
        """Set one slot, of a frozen object too."""
        self._slots[key].__set__(self._owner, value)

    def remove(self, key: Any) -> None:
        """Leave one slot empty."""
        self._slots[key].__delete__(self._owner)


class Snapshot:
    """The entries of a container as they are now, by identity.

    Args:
        container: the container.
    """

    def __init__(self, container: Any):
        self._container, self._kind = container, _kind(container)
        self._sequence = members(container)
        self._places = [(place, place.now()) for place in places(container)]

    def put_back(self) -> None:
        """Give the container the entries that it had, where they are others now."""
        for place, entries in self._places:
            place.put_back(entries)
        now, before = members(self._container), self._sequence
        if now is None or before is None or _same(now, before):
            return
        if self._kind is list:
            list.__setitem__(self._container, slice(None), before)
        elif self._kind is deque:
            deque.clear(self._container)
            deque.extend(self._container, before)
        elif {id(part) for part in now} != {id(part) for part in before}:
            set.clear(self._container)
            set.update(self._container, before)


def members(container: Any) -> list[Any] | None:
    """Entries of lists, deques and sets; None for others."""
    kind = _kind(container)
    return list(kind.__iter__(container)) if kind in (list, deque, set) else None


def put_member(container: Any, k: int, old: Any, new: Any) -> None:
    """Put another value in the place of a member of a list, deque or set.

    Args:
        container: the container.
        k: index of the member.
        old: the member.
        new: the other value.
    """
    kind = _kind(container)
    if kind is set:
        set.discard(container, old)
        set.add(container, new)
    else:
        kind.__setitem__(container, k, new)


def rebuilt(value: Any, parts: list[Any]) -> Any:
    """A tuple or frozen set of the same class with other parts."""
    kind = type(value)
    if hasattr(kind, "n_sequence_fields"):  # what torch returns of several
        return kind(parts)
    new = (tuple if isinstance(value, tuple) else frozenset).__new__(kind, parts)
    attributes = _attributes(new)
    if attributes is not None:
        attributes.update(_attributes(value) or {})
    return new


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _kind(value: Any) -> Any:
    """Which of the built-in containers a value is one of, whatever it says; or None."""
    return next((kind for kind in KINDS if issubclass(type(value), kind)), None)


def _is_container(value: Any) -> bool:
    """Whether a value has entries, or attributes, that are the model's."""
    if isinstance(value, CODE) or is_plain(value):
        return False
    kind = _kind(value)
    if kind in (dict, OrderedDict) and (
        value is sys.modules or any(dict.__contains__(value, k) for k in SCOPE)
    ):
        return False
    if kind is not None:
        return bool(kind.__len__(value) <= ENTRIES)
    library = str(getattr(type(value), "__module__", "")).partition(".")[0]
    if library in sys.stdlib_module_names and not isinstance(value, OBJECTS):
        return False
    return _attributes(value) is not None or bool(_slots(value))


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's own attributes, or None where it has no place for them."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _slots(value: Any) -> dict[str, Any]:
    """An object's slots by name."""
    return {
        f"{owner.__qualname__}.{name}": member
        for owner in type(value).__mro__
        if "__slots__" in vars(owner)
        for name, member in vars(owner).items()
        if isinstance(member, MemberDescriptorType)
    }


def _parts(container: Any) -> list[Any]:
    """What is in a container."""
    kind = _kind(container)
    found = [] if kind in (None, dict, OrderedDict) else list(kind.__iter__(container))
    for place in places(container):
        found.extend(place.now().values())
    return found
