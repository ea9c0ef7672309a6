"""A small module that knows nothing of priors, and fits of it by Lightning and by hand."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import MarglikTuner

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SGD = partial(torch.optim.SGD, lr=0.3)
TUNED = {"n_epochs_burnin": 1, "n_hypersteps": 3, "tune": "all"}


class Module(L.LightningModule):
    """One hidden layer, cross-entropy or mean squared error, plain SGD."""

    def __init__(self, outputs=3, loss=F.cross_entropy, optimizer=SGD):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
        self.loss, self.made = loss, optimizer

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def configure_optimizers(self):
        return self.made(self.parameters())


class Validated(Module):
    """With a loss on held-out data."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))


def data(kind="classification", n=23):
    """Points in four dimensions; 23 are five batches of five, the last one short."""
    x = torch.randn(n, 4, dtype=torch.float64)
    if kind == "regression":
        y = torch.stack([x[:, 0].sin(), x[:, 1]], 1) + 0.1 * torch.randn(n, 2).double()
        return TensorDataset(x, y)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader_of(dataset, batch_size=5):
    return DataLoader(dataset, batch_size=batch_size)


def fitted(
    module, dataset, callback, *, epochs=3, loader=None, val=None, ckpt_path=None, **options
):
    """The trainer after a fit in double precision."""
    callbacks = [callback, *options.pop("callbacks", [])]
    options = {**QUIET, "precision": "64-true", "max_epochs": epochs, **options}
    trainer = L.Trainer(callbacks=callbacks, **options)
    loader = loader_of(dataset) if loader is None else loader
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def by_hand(
    module,
    dataset,
    likelihood="classification",
    *,
    epochs=3,
    of=1,
    clip=None,
    units=None,
    dtype=torch.float64,
    batch_size=5,
):
    """A loop over `MarglikTuner.loss` on a copy: gradients of so many batches, clipped, a step.

    Args:
        of: number of batches whose mean gradient is a step's.
        clip: largest norm of a step's gradient.
        units: of the module's loss in nats, by the tuner; 1 where it is left out.
        dtype: of the weights, or bfloat16 for that of products alone.
    """
    mixed = dtype == torch.bfloat16
    module = deepcopy(module).to(torch.float32 if mixed else dtype)
    tuner = MarglikTuner(module, likelihood, len(dataset), **TUNED)
    optimizer, loader = module.configure_optimizers(), loader_of(dataset, batch_size)
    for _ in range(epochs):
        module.train()
        batches = list(loader)
        for first in range(0, len(batches), of):
            optimizer.zero_grad()
            for x, y in batches[first : first + of]:
                scale = 1.0 if units is None else units(tuner)
                with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                    output = module(x)
                (scale * tuner.loss(output, y) / of).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
        tuner.step(loader)
    return module, tuner


def assert_same_training(module, tuner, other, others_tuner, **tolerance):
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-10}
    for name, value in other.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, **tolerance)
    assert len(tuner.history) == len(others_tuner.history)
    for name, value in others_tuner.hyperparameters().items():
        torch.testing.assert_close(tuner.hyperparameters()[name], value, **tolerance)
