"""Networks of several kinds learn by the layers' factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim.loops import (
    ALWAYS,
    CAREFUL,
    FISHERS,
    MODELS,
    Tied,
    labels,
    train,
)

from kfac_laplace.optim import KFAC, Estimate


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_learn_and_their_layers_have_factors(name, fisher):
    make, x, y, covered = MODELS[name]
    model = make()
    optimizer = KFAC(model, curvature=Estimate(fisher, every=2, bases_every=2), **CAREFUL)
    torch.manual_seed(0)
    first, last = train(model, optimizer, x, y)
    assert last < 0.8 * first
    assert {n for n, kind in optimizer.coverage.items() if kind == "kfac"} == covered
    captured = {p for block in optimizer.curvature(24).blocks.values() for p in block.params}
    assert captured == covered


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_tied_table_and_a_loss_of_tokens(fisher):
    model, x = Tied(), labels(12, 9, 6)
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x).mT, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.coverage == {
        "table.weight": "adamw", "inner.weight": "kfac", "inner.bias": "kfac"
    }  # fmt: skip
    assert optimizer.settings == {"inner.weight": "expand"}


@pytest.mark.parametrize("fisher", FISHERS)
def test_autocast_in_bfloat16(fisher):
    make, x, y, _ = MODELS["transformer"]
    model = make()
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(b.output_sum.dtype == torch.float32 for b in optimizer.curvature(24).blocks.values())


@pytest.mark.parametrize("fisher", FISHERS)
def test_parameters_in_bfloat16(fisher):
    make, x, y, _ = MODELS["mlp"]
    model = make().bfloat16()
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    first, last = train(model, optimizer, x.bfloat16(), y)
    assert last < 0.8 * first
    assert all(s["m"].dtype == torch.float32 for s in optimizer.state.values())
