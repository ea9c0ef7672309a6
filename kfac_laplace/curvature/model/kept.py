"""What modules keep of a pass: no graph of ours is left in them.

Layers that offer their attention for plotting, auxiliary losses and caches hold tensors of the last
forward pass. With the graph of one of ours in them a model can be neither copied nor pickled, and
a cache would hand the next batch tensors whose making nobody saw.
"""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

#: What every module has: modes, hooks, and parameters, buffers and modules, looked at on their own.
OWN = frozenset(vars(nn.Module()))
#: Kinds in which there is nothing to look for.
PLAIN = frozenset({bool, int, float, str, bytes, type(None), torch.dtype, torch.device})
PLAIN_CONTAINERS = (list, tuple, dict, deque, set, frozenset)
#: Containers are followed so deep, where objects of other classes count twice: behind them may be
#: a whole program. Those of more entries hold data rather than activations.
DEPTH, ENTRIES = 5, 10_000


class Kept:
    """What the modules of a model hold, to be put back where a pass leaves a graph.

    A module in which a tensor with a graph is found that had none before gets back all that it
    held: attributes, buffers, and the entries of lists, mappings and objects. Parts of it might
    contradict each other, as a cache and the flag that it is filled. What was written to in place
    leaves its graph instead. Modules without such a tensor stay as the pass leaves them: one that
    counts its calls has been called.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._registered = frozenset(map(id, modules))
        seen = set(self._registered)
        self._held = [_Held(module, seen) for module in modules]

    def put_back(self) -> None:
        """Leave no graph that was not there before, and modules that kept one as they were."""
        seen = set(self._registered)
        for held in self._held:
            if held.has_new_graph(seen):
                held.put_back()
                held.release(set(self._registered))

    def restore(self) -> None:
        """Give every module all that it held, as if nothing had run."""
        for held in self._held:
            held.put_back()

    def release(self) -> None:
        """Leave no graph that was not there before; what modules hold stays, without it."""
        seen = set(self._registered)
        for held in self._held:
            held.release(seen)


class _Held:
    """What one module holds: its attributes and buffers, and what is inside them.

    Args:
        module: the module.
        seen: identities of objects that others hold; those found are added.
    """

    def __init__(self, module: nn.Module, seen: set[int]):
        self._module = module
        self._attributes = dict(vars(module))
        self._buffers = dict(module._buffers)
        self._inside: list[tuple[Any, Any]] = []  # containers, and copies of their entries
        self._graphs: dict[int, Tensor] = {}  # tensors that have one already
        for found in _within(self._values(), seen):
            if not isinstance(found, Tensor):
                self._inside.append((found, _entries(found)))
            elif _has_graph(found):
                self._graphs[id(found)] = found

    def _values(self) -> list[Any]:
        """Attributes and buffers as they are now, but for plain ones."""
        values = [
            value
            for key, value in vars(self._module).items()
            if key not in OWN and not _is_plain(value)
        ]
        return [*values, *self._module._buffers.values()]

    def _is_new(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and _has_graph(tensor) and id(tensor) not in self._graphs

    def has_new_graph(self, seen: set[int]) -> bool:
        """Whether it holds a tensor that has a graph now and was not there, or had none."""
        values = self._values()
        return bool(values) and any(map(self._is_new, _within(values, seen)))

    def put_back(self) -> None:
        """Everything as it was, but for values written in place."""
        own = vars(self._module)
        for key in own.keys() - self._attributes.keys():
            del own[key]
        own.update((key, value) for key, value in self._attributes.items() if key not in OWN)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for container, entries in self._inside:
            _refill(container, entries)

    def release(self, seen: set[int]) -> None:
        """Take new tensors out of their graphs."""
        for where in (vars(self._module), self._module._buffers):
            for key in [key for key in where if key not in OWN]:
                where[key] = self._released(where[key], seen)

    def _released(self, value: Any, seen: set[int], depth: int = DEPTH) -> Any:
        """The value, or what has to stand in its place."""
        if isinstance(value, Tensor):
            if not self._is_new(value):
                return value
            # In place, so that whoever else holds it is free of the graph: views cannot.
            return value.detach() if _stays(value) else value.detach_()
        if depth <= 0 or _is_plain(value) or not _is_container(value) or id(value) in seen:
            return value
        seen.add(id(value))
        depth -= _steps(value)
        if isinstance(value, tuple | set | frozenset):
            parts = [self._released(part, seen, depth) for part in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        numbered = isinstance(value, list | deque)
        entries = value if numbered or isinstance(value, dict) else vars(value)
        for key, part in list(enumerate(value) if numbered else entries.items()):
            released = self._released(part, seen, depth)
            if released is not part:
                entries[key] = released
        return value


def _has_graph(tensor: Tensor) -> bool:
    """Whether a tensor hangs in a graph, or stands in it for a parameter, or is a transform's."""
    in_graph = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return in_graph or is_functorch_wrapped_tensor(tensor)


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor cannot leave its graph in place."""
    return tensor._is_view() or is_functorch_wrapped_tensor(tensor)


def _is_plain(value: Any) -> bool:
    """Whether there is nothing to look for in a value, as in most attributes of most layers."""
    kind = type(value)
    if kind is tuple:
        return all(type(part) in PLAIN for part in value)
    return kind in PLAIN


def _is_container(value: Any) -> bool:
    """Whether a value has entries, or attributes, to be looked at."""
    if isinstance(value, PLAIN_CONTAINERS):
        return len(value) <= ENTRIES
    if isinstance(value, nn.Module):
        return True
    return hasattr(value, "__dict__") and not callable(value)


def _within(values: Iterable[Any], seen: set[int]) -> list[Any]:
    """The tensors and containers among values, and those inside of these."""
    found, stack = [], [(value, DEPTH) for value in values]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif depth > 0 and not _is_plain(value) and _is_container(value) and id(value) not in seen:
            seen.add(id(value))
            found.append(value)
            depth -= _steps(value)
            stack.extend((part, depth) for part in _parts(value))
    return found


def _steps(container: Any) -> int:
    """How much of the depth a container takes."""
    return 1 if isinstance(container, (*PLAIN_CONTAINERS, nn.Module)) else 2


def _parts(container: Any) -> Iterable[Any]:
    """What is in a container."""
    if isinstance(container, list | tuple | deque | set | frozenset):
        return container
    return (container if isinstance(container, dict) else vars(container)).values()


def _entries(container: Any) -> Any:
    """A copy of the entries of a container that can change."""
    if isinstance(container, tuple | frozenset):
        return None
    if isinstance(container, list | deque | set):
        return list(container)
    return dict(container if isinstance(container, dict) else vars(container))


def _refill(container: Any, entries: Any) -> None:
    """Give a container the entries that it had."""
    if entries is None:
        return
    if isinstance(container, list):
        container[:] = entries
        return
    place = container if isinstance(container, deque | set | dict) else vars(container)
    place.clear()
    if isinstance(place, deque):
        place.extend(entries)
    else:
        place.update(entries)
