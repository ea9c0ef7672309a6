"""A layer as a user writes it, in the smallest network around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import BATCH_SIZES, N_DATA, Case
from torch import Tensor, nn
from zoo.case import lively

WIDTH, POSITIONS, VOCABULARY, OUTPUTS = 4, 3, 5, 3

Draw = Callable[[], Tensor]


def rows(*shape: int) -> Draw:
    """Inputs (n, *shape)."""
    return lambda: torch.randn(N_DATA, *shape, dtype=torch.float64)


def tokens() -> Tensor:
    """Indices (n, positions)."""
    return torch.randint(0, VOCABULARY, (N_DATA, POSITIONS))


def ragged() -> Tensor:
    """Sequences (n, positions, width) of lengths 1, 2, …, behind which there are zeros."""
    lengths = 1 + torch.arange(N_DATA) % POSITIONS
    live = torch.arange(POSITIONS) < lengths[:, None]
    return rows(POSITIONS, WIDTH)() * live[..., None]


@dataclass(frozen=True)
class Kind:
    """A layer of the table; it has several rows where its parameters are treated differently.

    Args:
        name: what the table calls the layer.
        layer: makes it; it takes what `inputs` draws.
        inputs: draws the inputs of all examples.
        linear: whether the layer is a linear map, so that theorems of linear networks hold.
        channels: axis of the layer's output that runs over the features.
    """

    name: str
    layer: Callable[[], nn.Module]
    inputs: Draw = rows(POSITIONS, WIDTH)
    linear: bool = False
    channels: int = -1

    def case(self) -> Case:
        """A classifier with the layer, tanh, the mean over positions, a head."""
        return self._case(nn.Tanh(), "classification", keeps_positions=False)

    def linear_case(self, keeps_positions: bool) -> Case:
        """The layer and a linear head with Gaussian outputs: one an example, or a position."""
        return self._case(nn.Identity(), "regression", keeps_positions)

    def _case(self, activation: nn.Module, likelihood: str, keeps_positions: bool) -> Case:
        torch.manual_seed(sum(map(ord, self.name)))
        x = self.inputs()
        layer = lively(self.layer())
        width = layer(x[:2]).shape[self.channels]
        model = Around(layer, activation, lively(nn.Linear(width, OUTPUTS)))
        model.channels, model.keeps_positions = self.channels, keeps_positions
        f = model(x)
        y = torch.randint(0, OUTPUTS, f.shape[:-1])
        y = y if likelihood == "classification" else torch.randn_like(f)
        batches = list(zip(x.split(BATCH_SIZES), y.split(BATCH_SIZES), strict=True))
        return Case(model, likelihood, batches)


class Around(nn.Module):
    """What stands around the layer."""

    channels = -1
    keeps_positions = False

    def __init__(self, layer: nn.Module, activation: nn.Module, head: nn.Module):
        super().__init__()
        self.layer = layer
        self.activation = activation
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.layer(x)).movedim(self.channels, -1)
        if h.ndim > 2 and not self.keeps_positions:
            h = h.flatten(1, -2).mean(1)
        return self.head(h)
