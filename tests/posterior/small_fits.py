"""Small posteriors of several kinds, fitted to seeded data in float64."""

from __future__ import annotations

import torch
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.likelihoods import NAMED


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(outputs=2):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    for k, parameter in enumerate(model.parameters()):  # in float64, of which all digits count
        parameter.data.copy_(drawn(*parameter.shape, seed=k) / 2)
    return model


def fit(model, likelihood="classification", x=None, y=None, **options):
    x = drawn(9, 4) if x is None else x
    if y is None:
        plain = NAMED[likelihood]() if isinstance(likelihood, str) else likelihood
        f = plain.align(model(x).detach().double(), -1)
        y = plain.sample(f, torch.Generator().manual_seed(4)).reshape(len(x), -1)
        y = y[:, 0] if plain.has_logits and likelihood == "classification" else y
    return Laplace(model, likelihood, **options).fit([(x[:5], y[:5]), (x[5:], y[5:])])


def calibrated():
    la = fit(net())
    la.posterior_scale, la.predictive_temperature = 0.3, 1.7
    return la


def tuned(structure, **options):
    la = fit(net(), "regression", hessian_structure=structure, **options)
    return la.optimize_prior(n_steps=20)


def with_buffers():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model(drawn(20, 4))
    return fit(model.eval())


def narrow(dtype):
    return fit(net().to(dtype), x=drawn(9, 4).to(dtype), y=torch.arange(9) % 2)
