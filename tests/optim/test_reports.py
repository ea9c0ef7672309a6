"""What the optimiser says, and when."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from optim.loops import (
    ALWAYS,
    MODELS,
    draws,
    labels,
    mlp,
    same_parameters,
    train,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_laplace.errors import NotFitted, UnsupportedUse
from kfac_laplace.optim import KFAC, Estimate


def test_a_model_that_is_never_called_is_told_of(caplog):
    """Its layers are called one by one, which no hook of the whole sees."""
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[1](model[0](x))), y).backward()
            optimizer.step()
    assert [r.getMessage() for r in caplog.records if "no training pass" in r.getMessage()]
    assert len(caplog.records) == 1
    assert set(optimizer.coverage.values()) == {"adamw"}
    with pytest.raises(NotFitted):
        optimizer.curvature(8)


def test_factors_that_come_late_take_over_the_moments():
    """In their own coordinates the steps go on as AdamW's would."""
    x, y = draws(8, 5), labels(8, 3)
    model, want = mlp(), mlp()
    optimizer = KFAC(model, curvature=Estimate(largest=0, **ALWAYS))
    adam = torch.optim.AdamW(want.parameters(), lr=0.01, betas=(0.9, 0.95), foreach=False)
    with optimizer.paused():
        train(model, optimizer, x, y, steps=3)
    train(model, optimizer, x, y, steps=3)
    train(want, adam, x, y, steps=6)
    assert set(optimizer.coverage.values()) == {"kfac"}
    assert same_parameters(model, want)


def test_closed_optimisers_go_on_with_what_they_have():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    train(model, optimizer, x, y, steps=2)
    before = optimizer.curvature(8).blocks["0.weight"].factors.input
    optimizer.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    train(model, optimizer, x, y, steps=2)
    assert torch.equal(before, optimizer.curvature(8).blocks["0.weight"].factors.input)


def test_factors_stay_between_captures():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, curvature=Estimate(every=5))
    seen = []
    for _ in range(12):
        train(model, optimizer, x, y, steps=1)
        seen.append(optimizer.curvature(8).blocks["2.weight"].factors.input)
    changed = [1] + [k + 1 for k in range(1, 12) if not torch.equal(seen[k], seen[k - 1])]
    assert changed == [1, 2, 4, 6, 7, 11]


def test_uncovered_parameters_may_be_refused():
    model = nn.Sequential(nn.Linear(5, 3), nn.PReLU())

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.power = model, nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.inner(x).sigmoid() ** self.power

    odd = Odd()
    optimizer = KFAC(odd, uncovered="error")
    with pytest.raises(UnsupportedUse, match="power"):
        train(odd, optimizer, draws(8, 5), labels(8, 3), steps=1)


def test_one_rank_of_a_distributed_run(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        make, x, y, _ = MODELS["mlp"]
        plain, inner = make(), make()
        model = DistributedDataParallel(inner)
        train(plain, KFAC(plain, curvature=Estimate(**ALWAYS)), x, y, steps=4)
        train(model, KFAC(model, curvature=Estimate(**ALWAYS)), x, y, steps=4)
        assert same_parameters(plain, inner)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_loss_of_another_likelihood_is_told_of_once(outputs, caplog):
    """`KFAC(model)` is for cross-entropy; squares of residuals have other gradients."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, outputs), draws(8, 5)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(x), draws(8, outputs, seed=1)).backward()
        optimizer.step()
    assert [r.getMessage() for r in caplog.records if "likelihood" in r.getMessage()]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.ones(3)}])
def test_losses_that_belong_to_it_are_not(options, caplog):
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    F.cross_entropy(model(x), y, **options).backward()
    optimizer.step()
    other = nn.Linear(5, 2)
    regression = KFAC(other, "regression", curvature=Estimate(**ALWAYS))
    F.mse_loss(other(x), draws(8, 2, seed=1)).backward()
    regression.step()
    assert not caplog.records
