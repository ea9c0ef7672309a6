"""What modules keep of a pass: no graph of ours is left in them, nor a trace of runs in between.

Layers that offer their attention for plotting, auxiliary losses and caches hold tensors of the last
forward pass. With the graph of one of ours in them a model can be neither copied nor pickled, and
a cache would hand the next batch tensors whose making nobody saw.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from kfac_laplace.curvature.model.containers import (
    Place,
    Snapshot,
    is_plain,
    members,
    places,
    put_member,
    rebuilt,
    within,
)
from kfac_laplace.curvature.model.written import Values

#: What every module has: modes, hooks, and parameters, buffers and modules, looked at on their own.
OWN = frozenset(vars(nn.Module()))


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, modules hold after it what they held before, with the same values.

    A fit runs some batches more than once: a model that counts, averages or lists what it sees
    is to see each of them once.

    Args:
        model: the model.
    """
    kept = Kept(model, values=True)
    try:
        yield
    finally:
        kept.restore()


class Kept:
    """What the modules of a model hold, to be put back where a pass leaves a graph.

    A module in which a tensor with a graph is found that had none before gets back all that it
    held: attributes, buffers, and the entries of lists, mappings and objects. Parts of it might
    contradict each other, as a cache and the flag that it is filled. What was written to in place
    leaves its graph instead. Modules without such a tensor stay as the pass leaves them: one that
    counts its calls has been called.

    Args:
        model: the model.
        values: whether `restore` takes back what was written into tensors and arrays as well.
    """

    def __init__(self, model: nn.Module, values: bool = False):
        modules = list(model.modules())
        self._registered = frozenset(map(id, modules))
        seen = set(self._registered)
        self._held = [_Held(module, seen) for module in modules]
        self._values = Values([t for held in self._held for t in held.arrays] if values else [])

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
        self._values.restore()

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
        self._places = [Place(vars(module), dict, OWN), Place(module._buffers)]
        self._before = [place.now() for place in self._places]
        self._inside: list[Snapshot] = []
        self._graphs: dict[int, Tensor] = {}  # tensors that have one already
        self._free: dict[int, tuple[Tensor, Tensor]] = {}  # those taken out of theirs by a copy
        self.arrays: list[Any] = []
        for found in within(self._values(), seen):
            if isinstance(found, Tensor):
                self.arrays.append(found)
                if _has_graph(found):
                    self._graphs[id(found)] = found
            elif isinstance(found, np.ndarray):
                self.arrays.append(found)
            else:
                self._inside.append(Snapshot(found))

    def _values(self) -> list[Any]:
        """Attributes and buffers as they are now, but for plain ones."""
        return [v for place in self._places for v in place.now().values() if not is_plain(v)]

    def _is_new(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and _has_graph(tensor) and id(tensor) not in self._graphs

    def has_new_graph(self, seen: set[int]) -> bool:
        """Whether it holds a tensor that has a graph now and was not there, or had none."""
        values = self._values()
        return bool(values) and any(map(self._is_new, within(values, seen)))

    def put_back(self) -> None:
        """Everything as it was, but for values written in place."""
        for place, before in zip(self._places, self._before, strict=True):
            place.put_back(before)
        for snapshot in self._inside:
            snapshot.put_back()

    def release(self, seen: set[int]) -> None:
        """Take new tensors out of their graphs."""
        inside = [found for found in within(self._values(), seen) if not _is_array(found)]
        for place in [*self._places, *(place for found in inside for place in places(found))]:
            for key, value in place.now().items():
                released = self._released(value)
                if released is not value:
                    place.put(key, released)
        for found in inside:
            for k, value in enumerate(members(found) or ()):
                released = self._released(value)
                if released is not value:
                    put_member(found, k, value, released)

    def _released(self, value: Any) -> Any:
        """The value, or what has to stand in its place."""
        if isinstance(value, Tensor):
            if not self._is_new(value):
                return value
            if not _stays(value):
                return value.detach_()  # so that whoever else holds it is free of the graph
            return self._free.setdefault(id(value), (value, value.detach()))[1]
        if not isinstance(value, tuple | frozenset) or is_plain(value):
            return value
        parts = [self._released(part) for part in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else rebuilt(value, parts)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _has_graph(tensor: Tensor) -> bool:
    """Whether a tensor hangs in a graph, or stands in it for a parameter, or is a transform's."""
    in_graph = tensor.requires_grad and not isinstance(tensor, nn.Parameter)
    return in_graph or is_functorch_wrapped_tensor(tensor)


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor cannot leave its graph in place."""
    return tensor._is_view() or is_functorch_wrapped_tensor(tensor)
