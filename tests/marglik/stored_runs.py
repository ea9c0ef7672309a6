"""Training runs step by step, and all that a file has to hold for them to go on."""

from __future__ import annotations

from dataclasses import asdict

import torch
from cases import build
from marglik.small_networks import Transformer, sequences
from torch import nn

from kfac_laplace import MarglikTuner
from kfac_laplace.optim import KFAC, Damped

EPOCHS = 4


class Masked(nn.Module):
    """A rectifier network over tokens of which a mask hides some: rows that nothing reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        present = (x[..., :1] > -0.5).to(x)
        hidden = self.dropout(self.first(x).relu())
        return self.second((hidden * present).sum(1) / present.sum(1).clamp_min(1))


def network(name):
    """Model, likelihood and batches."""
    if name in ("transformer", "masked"):
        model = Transformer() if name == "transformer" else Masked().double()
        x, y = sequences(10)
        return model, "classification", [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])]
    case = build(name)
    return case.model, case.likelihood, case.batches


class Run:
    """A model, its optimiser, a schedule and a tuner in training."""

    def __init__(self, name, kind, options):
        torch.manual_seed(4)
        self.model, likelihood, self.batches = network(name)
        n = sum(len(y) for _, y in self.batches)
        self.model.train()
        if kind == "adam":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        else:
            rule = {"rule": Damped()} if kind == "damped" else {}
            self.optimizer = KFAC(self.model, likelihood, lr=0.02, weight_decay=0, **rule)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 12)
        shared = {"curvature": self.optimizer} if kind == "shared" else {}
        self.tuner = MarglikTuner(self.model, likelihood, n, **shared, **options)
        if kind == "damped":
            self.optimizer.damped_by(self.tuner)
        self.kind = kind

    def parts(self):
        return [self.model, self.optimizer, self.schedule, self.tuner]

    def events(self):
        for epoch in range(1, EPOCHS + 1):
            yield from ((epoch, k) for k in range(len(self.batches)))
            yield epoch, None

    def do(self, event):
        epoch, k = event
        if k is None:
            without = self.kind == "shared" and epoch in (2, 3)
            self.tuner.step(None if without else self.batches, epoch)
            return
        output, y = self.tuner.forward(self.batches[k])
        loss = self.tuner.loss(output, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def state(self):
        return [*(one.state_dict() for one in self.parts()), torch.get_rng_state()]

    def load(self, state):
        for one, own in zip(self.parts(), state, strict=False):
            one.load_state_dict(own)
        torch.set_rng_state(state[-1])

    def result(self):
        """All but how long things took."""
        records = [
            {name: value for name, value in asdict(record).items() if "seconds" not in name}
            for record in self.tuner.history
        ]
        parts = [self.model.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()]
        return [records, self.tuner.hyperparameters(), *parts, torch.get_rng_state()]
