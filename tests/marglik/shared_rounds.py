"""Small problems, and an optimiser with a tuner that shares its curvature."""

from marglik.small_networks import Transformer, made, rows, sequences
from torch import nn

from kfac_laplace import MarglikTuner
from kfac_laplace.optim import KFAC, Estimate

EXACT = Estimate("exact", every=1, ema=1)


def batches(x, y, size=7):
    return [*zip(x.split(size), y.split(size), strict=True)]


def pair(model, likelihood, n, *, lr=0.0, estimate=EXACT, **options):
    """An optimiser, and a tuner that shares its curvature."""
    optimizer = KFAC(model, likelihood, lr=lr, weight_decay=0, curvature=estimate)
    options = {"n_epochs_burnin": 1, "fisher": "exact", **options}
    return optimizer, MarglikTuner(model, likelihood, n, curvature=optimizer, **options)


def epoch(model, optimizer, tuner, loader):
    for x, y in loader:
        optimizer.zero_grad()
        tuner.loss(model(x), y).backward()
        optimizer.step()


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def problem(name):
    if name == "transformer":
        return made(Transformer), "classification", sequences()
    if name == "regression":
        x, _ = rows()
        return made(mlp), "regression", (x, x[:, :3].sin())
    if name == "studentt":
        x, _ = rows()
        return made(mlp), "studentt", (x, x[:, :3].sin())
    return made({"mlp": mlp, "normed": normed}[name]), "classification", rows()
