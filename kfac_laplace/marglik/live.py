"""A model's parameters as they are now, found again without a walk through its modules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class LiveParameters:
    """Parameters by name, whatever was put in their place since.

    `named_parameters` walks through all modules on each call. Here the walk is made once; a call
    looks whether modules and parameters still hang where they did, in torch's own dictionaries, and
    walks again where they do not.

    Args:
        model: the module.
        names: names of the parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self._model, self._names = model, tuple(names)
        self._walk()

    def __call__(self) -> dict[str, Tensor]:
        """The parameters."""
        if self.moved:
            self._walk()
        return self.found

    @property
    def moved(self) -> bool:
        """Whether the model's parameters are others than at the last walk.

        Others: added, removed, replaced, frozen, unfrozen, reshaped ones, or on another device.
        """
        return not (
            self._children == self._children_then  # by identity: modules have no equality
            and list(map(len, self._slots)) == self._counts
            and all(own.get(key) is parameter for own, key, parameter in self._places)
            and self._kinds() == self._kinds_then
        )

    def _walk(self) -> None:
        """Note where each module and each parameter hangs."""
        named = dict(self._model.named_parameters())
        #: the parameters as they were at the last walk
        self.found: dict[str, Tensor] = {name: named[name] for name in self._names}
        modules = list(self._model.modules())
        self._children: list[dict[str, Any]] = [module._modules for module in modules]
        self._children_then = [dict(children) for children in self._children]
        self._slots: list[dict[str, Any]] = [module._parameters for module in modules]
        self._counts = list(map(len, self._slots))
        self._places = [(own, key, p) for own in self._slots for key, p in own.items()]
        self._tensors: list[Tensor] = list(named.values())
        self._kinds_then = self._kinds()

    def _kinds(self) -> tuple[object, ...]:
        """What may change in parameters that stay where they are; their device in all at once."""
        tensors = self._tensors
        device = tensors[0].device if tensors else None
        return device, [p.requires_grad for p in tensors], [p.shape for p in tensors]


def first_entries(model: nn.Module) -> Tensor:
    """The first entry of each parameter, float64: a look at whether training moved them.

    Not their version counters, which optimisers that write through `.data` leave as they are.
    """
    entries = [p.detach().flatten()[:1].abs().double() for p in model.parameters()]
    return torch.cat(entries) if entries else torch.zeros(0, device="cpu")
