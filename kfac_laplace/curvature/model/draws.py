"""All that a pass over a loader may draw from, put back to where a pass began."""

from typing import Any

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.model.random_states import RandomStates


class Draws:
    """All that a pass may draw from: global random states, and generators of the loader's own.

    Args:
        device: the device.
        loader: the data.
    """

    def __init__(self, device: torch.device, loader: object):
        self._generators = generators_of(loader)
        self._states, self.device = RandomStates.now(device), device
        self._own = [generator.get_state() for generator in self._generators]

    def to_plain(self) -> dict[str, Any]:
        """The states when this was made, as plain data."""
        return {"states": self._states.to_plain(), "loader": self._own}

    def put_back(self) -> None:
        """Return to them."""
        self.put(self._states, self._own)

    def put(self, states: RandomStates, own: list[Tensor]) -> None:
        """Go to other ones; where they are none, nothing has moved."""
        try:
            states.restore()
            for generator, state in zip(self._generators, own, strict=True):
                generator.set_state(state)
        except Exception:
            if states is not self._states:
                self.put_back()
            raise


def generators_of(loader: object) -> list[Generator]:
    """Generators of its own from which a DataLoader draws; each once."""
    places = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    places.append(getattr(places[2], "sampler", None))
    found = {
        id(one): one
        for place in places
        if isinstance(one := getattr(place, "generator", None), Generator)
    }
    return list(found.values())
