"""Small networks with data, and the loop that trains them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kfac_laplace.optim import Damped

ALWAYS = {"every": 1, "bases_every": 1}
FISHERS = ["mc", "empirical"]
#: As long as the eigenbases of few examples turn, second moments kept by index say little.
CAREFUL = {"lr": 0.02, "rule": Damped()}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(n, classes, *axes):
    return torch.randint(0, classes, (n, *axes), generator=torch.Generator().manual_seed(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head, self.checkpointed = nn.Linear(8, 3), checkpointed

    def forward(self, x):
        h = self.into(x)
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A language model whose head is its table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.inner(self.table(x)).tanh(), self.table.weight)


MODELS = {
    "mlp": (mlp, draws(24, 5), labels(24, 3), {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "batch norm, dropout, in place": (
        convolutions,
        draws(24, 1, 8, 8),
        labels(24, 3),
        {"0.weight", "0.bias", "3.weight", "3.bias", "9.weight", "9.bias"},
    ),
    "transformer": (
        Transformer,
        draws(24, 4, 5),
        labels(24, 3),
        {name for name, _ in Transformer().named_parameters() if "norm" not in name},
    ),
    # A fused call of attention, which would save other tensors as plain calls, stays fused there.
    "checkpoint": (
        lambda: Transformer(True),
        draws(24, 4, 5),
        labels(24, 3),
        {n for n, _ in Transformer().named_parameters() if "norm" not in n and "attn" not in n},
    ),
    "lstm": (
        Recurrent,
        draws(24, 4, 5),
        labels(24, 3),
        {name for name, _ in Recurrent().named_parameters()},
    ),
}


def train(model, optimizer, x, y, steps=12, step=None):
    """The first and the last loss."""
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step() if step is None else step(optimizer)
        losses.append(loss.item())
    return losses[0], losses[-1]


def same_parameters(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
