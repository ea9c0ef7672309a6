"""A capture leaves the model, its copies and the training pass as they would be."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from optim.captured import (
    assert_nothing_pending,
    batch,
    capture,
    factors,
    small,
)
from torch import nn


@pytest.fixture
def data():
    return batch()


def hooks(model):
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


def test_hooks_go_with_close_and_with_the_last_reference():
    model = small()
    found = capture(model, "classification")
    assert hooks(model) == 2
    found.close()
    assert hooks(model) == 0
    found = capture(model, "classification")
    del found
    gc.collect()
    assert hooks(model) == 0


def test_a_copied_or_stored_model_has_hooks_that_do_nothing(data):
    model = small()
    found = capture(model, "classification")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        F.cross_entropy(other(data[0]), data[1]).backward()
    assert_nothing_pending(found)


def noisy():
    """Batch statistics, dropout, and writing in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_the_training_pass_is_what_it_would_have_been(fisher):
    """Loss, gradients, buffers, modes and the random state, bit by bit."""
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    seen = []
    for captured in (False, True):
        model = noisy()
        found = capture(model, "classification", fisher) if captured else None
        torch.manual_seed(3)
        losses = []
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
        assert all(module.training for module in model.modules())
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        state = model.state_dict() | gradients
        seen.append((losses, torch.get_rng_state(), state))
        if found is not None:
            assert found.take().keys() == {"0.weight", "5.weight"}
    (losses, draws, state), (others, more, its) = seen
    assert losses == others
    assert torch.equal(draws, more)
    for name, value in state.items():
        assert torch.equal(value, its[name]), name


def test_dropout_thins_the_factors():
    """They are those of the network that was run: inputs of dropped units are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2)).double()
    x = torch.ones(1, 50, dtype=torch.float64)
    found = capture(model, "regression", "exact")
    model(x).sum().backward()
    (inputs, _) = factors(found.take())["1.weight"]
    kept = inputs[0].diagonal()[:-1]
    assert set(kept.tolist()) == {0.0, 4.0}  # (1 / (1 − p))²
