"""A model's parameters as they are now, found again without a walk through its modules."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class LiveParameters:
    """Parameters by name, whatever was put in their place since.

    `named_parameters` walks through all modules on each call. Here the walk is made once; a call
    looks whether every module on the way still hangs where it did, in torch's own dictionaries, and
    walks again where one was replaced.

    Args:
        model: the module.
        names: names of the parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._model, self._names = model, tuple(names)
        self._walk()

    def __call__(self) -> dict[str, Tensor]:
        """The parameters."""
        if not all(own.get(key) is child for own, key, child in self._links):
            self._walk()
        return {name: own[key] for name, own, key in self._places}

    def _walk(self) -> None:
        """Note where each parameter hangs, and each module on the way to it."""
        modules = dict(self._model.named_modules())
        self._places: list[tuple[str, dict[str, Any], str]] = []
        on_the_way = set()
        for name in self._names:
            path, _, key = name.rpartition(".")
            self._places.append((name, modules[path]._parameters, key))
            while path:
                on_the_way.add(path)
                path = path.rpartition(".")[0]
        self._links: list[tuple[dict[str, Any], str, nn.Module]] = []
        for path in sorted(on_the_way):
            parent, _, key = path.rpartition(".")
            self._links.append((modules[parent]._modules, key, modules[path]))
