"""Networks whose outputs have their classes on an axis of choice, and the right values for them."""

from __future__ import annotations

import oracles
import torch
from torch import Tensor, nn

WIDTH, CLASSES = 2, 3


class Tagger(nn.Module):
    """(n, *positions, i) → outputs of each position, the classes on `axis`."""

    def __init__(self, axis: int, classes: int = CLASSES):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 4), nn.Linear(4, classes)
        self.axis = axis
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh()).movedim(-1, self.axis)


class Last(nn.Module):
    """The same network with its classes on the last axis, for oracles that read them there."""

    def __init__(self, tagger: Tagger):
        super().__init__()
        self.tagger = tagger

    def forward(self, x: Tensor) -> Tensor:
        return self.tagger(x).movedim(self.tagger.axis, -1)


def labelled(n: int, *positions: int, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Inputs and labels of n examples."""
    x = torch.randn(n, *positions, WIDTH, dtype=torch.float64)
    return x, torch.randint(0, classes, (n, *positions))


def dense_ggn(model: Tagger, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The exact GGN (p, p) of all parameters by autograd."""
    return sum(oracles.ggn(Last(model), x, y, "classification") for x, y in batches)


def dense_log_likelihood(model: Tagger, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ log p(y | f) by torch's own loss."""
    losses = oracles.negative_log_likelihoods
    return -torch.cat([losses(Last(model)(x), y, "classification") for x, y in batches]).sum()
