"""Learning rates, parameter groups and options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim.loops import (
    MODELS,
    convolutions,
    draws,
    labels,
    mlp,
    train,
)
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.optim import KFAC, Estimate


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=0.01, total_steps=8, cycle_momentum=False
        ),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    ],
)
def test_schedulers_built_before_the_first_step_move_all_groups(make):
    model, x, y = convolutions(), *MODELS["batch norm, dropout, in place"][1:3]
    other = torch.optim.AdamW(mlp().parameters(), lr=0.01)
    optimizer = KFAC(model)
    schedulers = [make(optimizer), make(other)]
    for _ in range(6):
        train(model, optimizer, x, y, steps=1)
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert len(optimizer.param_groups) == 1


def test_the_plateau_scheduler():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        train(model, optimizer, x, y, steps=1)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.0025


def test_groups_do_not_change():
    model = mlp()
    optimizer = KFAC(model)
    with pytest.raises(UnsupportedUse, match="do not change"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"params": [nn.Parameter(torch.ones(1))]}, InvalidValue),
        ({"params": [{"params": [], "momentum": 0.9}]}, InvalidValue),
        ({"params": ["weight"]}, InvalidType),
        ({"lr": -0.1}, InvalidValue),
        ({"lr": "fast"}, InvalidType),
        ({"weight_decay": float("nan")}, InvalidValue),
        ({"uncovered": "diag"}, InvalidValue),
        ({"likelihood": "classes"}, InvalidValue),
        ({"kfac_approx": "both"}, InvalidValue),
    ],
)
def test_wrong_options_are_refused(options, error):
    with pytest.raises(error):
        KFAC(mlp(), **options)


@pytest.mark.parametrize(
    "options",
    [{"fisher": "fast"}, {"every": 0}, {"bases_every": 0}, {"ema": 1.5}, {"largest": -1}],
)
def test_wrong_estimates_are_refused(options):
    with pytest.raises(InvalidValue):
        Estimate(**options)


def test_settings_are_in_the_models_order():
    """Names are in sets on the way, whose order strings have at random."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)))
    optimizer = KFAC(model)
    F.cross_entropy(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
    assert list(optimizer.settings) == [f"{k}.weight" for k in range(12)]
