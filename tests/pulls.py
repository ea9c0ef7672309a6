"""What pulls each parameter while the tuner is at work, against the formula by torch alone.

A group that was known keeps its δ, and a new one starts at the initial one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_laplace import MarglikTuner

N, START = 12, 2.5


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()


def data(likelihood="classification"):
    x = torch.randn(N, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (N,))
    if likelihood != "classification":
        y = F.one_hot(y, 2).double()
    return x, y


def tuner_of(model, likelihood="classification", **options):
    options = {"prior_precision": START, "n_hypersteps": 3} | options
    return MarglikTuner(model, likelihood, N, **options)


def fit_of(model, likelihood, x, y):
    """(1/B) Σ −log p but for constants, by torch."""
    f = model(x)
    if likelihood == "classification":
        return F.cross_entropy(f, y)
    if likelihood == "binary":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum") / N
    return F.mse_loss(f, y, reduction="sum") / (2 * N)


def assert_pulls(tuner, model, deltas, x, y, likelihood="classification"):
    """The gradient of the loss is that of the data plus δ θ / N, parameter by parameter."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(deltas) == set(named)
    scale = float(tuner.hyperparameters().get("sigma_noise", torch.ones(()))) ** -2
    got = torch.autograd.grad(tuner.loss(model(x), y), [*named.values()])
    fit = torch.autograd.grad(scale * fit_of(model, likelihood, x, y), [*named.values()])
    for (name, p), g, f in zip(named.items(), got, fit, strict=True):
        torch.testing.assert_close(
            g, f + deltas[name] * p.detach() / N, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_laplace_agrees(tuner, deltas, x, y):
    """The posterior has these precisions, and covers these parameters alone."""
    la = tuner.laplace([(x, y)])
    assert {name for name, kind in la.coverage.items() if kind != "frozen"} == set(deltas)
    groups = la.posterior.prior.by_group(la.prior_precision)
    for group in la.curvature.groups:
        for name in group.layout.params:
            assert float(groups[group.name].flatten()[0]) == pytest.approx(
                float(deltas[name]), rel=1e-12
            )


def by_name(tuner):
    """δ of each parameter of a tuner with layerwise precisions: a layer has one."""
    deltas = tuner.hyperparameters()["prior_precision"]
    return dict(zip(tuner.groups, deltas, strict=True))


def layer(k, delta):
    return {f"{k}.weight": delta, f"{k}.bias": delta}
