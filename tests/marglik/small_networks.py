"""A small transformer and its data, and how a tuner is watched, for tests of what is tuned."""

import torch
from torch import nn


class Transformer(nn.Module):
    """A class token, learned positions, norms with gains, attention and a head; float64."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        tokens = self.embed(x)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        z = self.norm(tokens)
        mixed = self.attention(z, z, z, need_weights=False)[0]
        return self.head((tokens + self.scale * mixed).mean(1))


def sequences(n=20):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, 3, generator=generator, dtype=torch.float64)
    return x, x.sum(1).argmax(1)


def rows(n=20, targets=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, x[:, :targets].argmax(1)


def made(build):
    torch.manual_seed(0)
    return build().double()


def moved(tuner, loader):
    """Names of the groups whose precision a round moved."""
    tuner.prepare(loader)
    before = tuner.hyperparameters()["prior_precision"].expand(len(tuner.groups))
    tuner.step(loader)
    after = tuner.hyperparameters()["prior_precision"]
    return {name for name, a, b in zip(tuner.groups, before, after, strict=True) if a != b}


def trained(model, tuner, loader, epochs=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    records = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        records.append(tuner.step(loader))
    return records


def said(tuner, reason):
    return {name for name, how in tuner.coverage.items() if reason in how}
