"""A table that some batches do not look anything up in."""

from __future__ import annotations

import torch
from cases import Case
from laws import REORDERED, assert_same_blocks, dense_blocks, fitted
from torch import Tensor, nn


class Routed(nn.Module):
    """A second table joins in where a batch has words beyond the first five."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Embedding(9, 3), nn.Embedding(9, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if int(x.max()) > 4:
            h = h + self.second(x)
        return self.head(h.tanh().mean(1))


def test_a_batch_without_lookups_adds_nothing():
    torch.manual_seed(4)
    model = Routed().double()
    x, low = torch.randint(0, 9, (4, 3)), torch.randint(0, 5, (3, 3))
    x[:, 0] = 8  # every example of the first batch looks something up
    y = torch.randint(0, 2, (7,))
    batches = [(x, y[:4]), (low, y[4:])]
    for setting in ("expand", "reduce"):
        both = fitted(Case(model, "classification", batches), kfac_approx=setting)
        one = fitted(Case(model, "classification", batches[:1]), kfac_approx=setting)
        assert both.blocks["second.weight"].factors.input.shape == (1, 9)
        want = {"second.weight": dense_blocks(one)["second.weight"]}
        got = {"second.weight": dense_blocks(both)["second.weight"]}
        assert_same_blocks(got, want, REORDERED)
