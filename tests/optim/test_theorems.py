"""Cases in which one undamped step with exact factors is Newton's, and so solves the problem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace.optim import KFAC, Damped, Estimate, ExactDamping

#: Of a condition number of some hundreds in float64.
SOLVED = 1e-8
NEWTON = {
    "lr": 1.0,
    "weight_decay": 0.0,
    "rule": Damped(ExactDamping(0.0), momentum=0.0, length=None),
    "curvature": Estimate(fisher="exact", every=1, bases_every=1, ema=0.0),
}


def draws(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient_after_a_step(model, x, y, **options):
    """Norm of the gradient of ½ Σ (f − y)²/n, before and after one step."""
    optimizer = KFAC(model, "regression", **{**NEWTON, **options})
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        loss.backward()
        norms.append(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5)
        optimizer.step()
    return norms


def test_least_squares_in_one_step():
    torch.manual_seed(0)
    before, after = gradient_after_a_step(nn.Linear(5, 3).double(), draws(40, 5), draws(40, 3))
    assert before > 0.1
    assert after < SOLVED


def test_the_mean_over_outputs_goes_two_cs_of_the_way():
    """`F.mse_loss` is 2/C of the likelihood's loss, which Newton's step does not know."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), draws(40, 5), draws(40, 3)
    optimizer = KFAC(model, "regression", **NEWTON)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1).double()], 1), y).solution
    best = nn.functional.mse_loss(torch.cat([x, torch.ones(40, 1).double()], 1) @ solution, y)
    left = (losses[1] - best.item()) / (losses[0] - best.item())
    assert left == pytest.approx((1 - 2 / 3) ** 2, rel=SOLVED)


class Shared(nn.Module):
    """A linear layer at several positions, averaged over them or not."""

    def __init__(self, pooled: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.pooled = nn.Linear(3, 2).double(), pooled

    def forward(self, x):
        h = self.layer(x)
        return h.mean(1) if self.pooled else h


@pytest.mark.parametrize("pooled", [True, False])
def test_reduce_is_exact_where_a_mean_is_taken_and_expand_where_none_is(pooled):
    """And each is wrong in the other's case."""
    x = draws(30, 4, 3)
    y = draws(30, 2) if pooled else draws(30, 4, 2)
    found = {
        setting: gradient_after_a_step(Shared(pooled), x, y, kfac_approx=setting)[1]
        for setting in ("expand", "reduce")
    }
    right, wrong = ("reduce", "expand") if pooled else ("expand", "reduce")
    assert found[right] < SOLVED
    assert found[wrong] > 0.1


def test_auto_takes_the_exact_one():
    x = draws(30, 4, 3)
    assert gradient_after_a_step(Shared(True), x, draws(30, 2))[1] < SOLVED
    assert gradient_after_a_step(Shared(False), x, draws(30, 4, 2))[1] < SOLVED


@pytest.mark.parametrize("sizes", [(40,), (20, 20), (8, 32)])
def test_micro_batches_make_one_newton_step(sizes):
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), draws(40, 5), draws(40, 3)
    optimizer = KFAC(model, "regression", **NEWTON)
    for _ in range(2):
        optimizer.zero_grad()
        for some, its in zip(x.split(sizes), y.split(sizes), strict=True):
            (0.5 * (model(some) - its).square().sum() / len(x)).backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
        optimizer.step()
    assert norm < SOLVED
