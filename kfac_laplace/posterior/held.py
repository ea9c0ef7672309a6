"""Blocks that lie in another memory than the model, and come to its device when they are used."""

from collections.abc import Callable, Iterator, Mapping

import torch

from kfac_laplace.posterior.block import BlockNormal


class Held(Mapping[str, BlockNormal]):
    """The posterior of each block: one that is asked for is made on the device, and not kept there.

    Args:
        blocks: by name, wherever they lie.
        device: where they are used.
    """

    def __init__(self, blocks: Mapping[str, BlockNormal], device: torch.device):
        self._blocks, self._device = dict(blocks), device

    def __getitem__(self, name: str) -> BlockNormal:
        """One of them, on the device."""
        return self._blocks[name].on(self._device)

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._blocks)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._blocks)

    def each(self, make: Callable[[BlockNormal], BlockNormal]) -> "Held":
        """Others that are made of them where they lie."""
        return Held({name: make(one) for name, one in self._blocks.items()}, self._device)
