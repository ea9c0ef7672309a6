"""Training loops as people write them: one line changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optim.loops import (
    ALWAYS,
    FISHERS,
    MODELS,
    draws,
    labels,
    mlp,
    same_parameters,
    train,
)
from torch import nn

from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.optim import KFAC, Estimate


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_closure_makes_the_same_steps(fisher):
    make, x, y, _ = MODELS["mlp"]
    plain, closed = make(), make()
    curvature = Estimate(fisher, every=2, bases_every=2)
    train(plain, KFAC(plain, curvature=curvature), x, y)
    optimizer = KFAC(closed, curvature=curvature)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(closed(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    assert same_parameters(plain, closed)


def scaled(model, x, y, optimizer, scaler, unscales, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(
    ("fisher", "unscales"), [("mc", False), ("mc", True), ("empirical", False)]
)
def test_a_scaled_loss_makes_the_same_steps(fisher, unscales):
    """A power of two leaves every digit as it is; so does a clip that is far off."""
    make, x, y, _ = MODELS["mlp"]
    plain, amp = make(), make()
    curvature = Estimate(fisher, **ALWAYS)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaled(amp, x, y, KFAC(amp, curvature=curvature), scaler, unscales)
    assert same_parameters(plain, amp)


def test_listening_has_to_know_the_scale():
    make, x, y, _ = MODELS["mlp"]
    model = make()
    optimizer = KFAC(model, curvature=Estimate("empirical", **ALWAYS))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    with pytest.raises(UnsupportedUse, match="unscale"):
        scaled(model, x, y, optimizer, scaler, True)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_step_that_the_scaler_skips_changes_nothing(fisher):
    make, x, y, _ = MODELS["mlp"]
    plain, amp = make(), make()
    curvature = Estimate(fisher, **ALWAYS)
    optimizer = KFAC(amp, curvature=curvature)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaler.scale(torch.inf * F.cross_entropy(amp(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same_parameters(plain, amp)
    optimizer.zero_grad()
    optimizer._generator.manual_seed(0)  # labels were drawn for the step that was skipped
    scaled(amp, x, y, optimizer, scaler, False)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=6)
    assert same_parameters(plain, amp)


def test_gradients_that_are_zeroed_take_their_curvature_along():
    """A loop that gives up a step after an exception and goes on with the next batch."""
    make, x, y, _ = MODELS["mlp"]
    plain, broken = make(), make()
    curvature = Estimate("exact", **ALWAYS)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=3)
    optimizer = KFAC(broken, curvature=curvature)
    F.cross_entropy(broken(3 * x), y).backward()  # the exception comes now, before the step
    train(broken, optimizer, x, y, steps=3)
    # (zero_grad stands after the forward pass of the next batch)
    assert same_parameters(plain, broken)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = mlp()
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    x, y = draws(8, 5), labels(8, 3)
    train(model, optimizer, x, y, steps=2)
    before = copy.deepcopy(model.state_dict())
    model[0].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    train(model, optimizer, x, y, steps=2)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.weight"}
    assert optimizer.coverage["2.weight"] == "frozen"


def test_a_parameter_that_is_trained_later_is_updated():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    x, y = draws(8, 5), labels(8, 3)
    train(model, optimizer, x, y, steps=2)
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    train(model, optimizer, x, y, steps=2)
    assert not torch.equal(before, model[0].weight)
    assert optimizer.coverage["0.weight"] == "adamw"


def test_two_models_with_an_optimiser_each():
    x, y = draws(8, 5), labels(8, 3)
    curvature = Estimate(**ALWAYS)
    alone, first, second = mlp(), mlp(), mlp()
    train(alone, KFAC(alone, curvature=curvature), x, y, steps=4)
    optimizers = [KFAC(first, curvature=curvature), KFAC(second, curvature=curvature)]
    for _ in range(4):
        loss = F.cross_entropy(first(x), y) + F.cross_entropy(second(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same_parameters(alone, first)
    assert same_parameters(alone, second)


def test_two_optimisers_for_the_parts_of_one_model():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    curvature = Estimate(**ALWAYS)
    both = [KFAC(model, params=model[k].parameters(), curvature=curvature) for k in (0, 2)]
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in both:
            optimizer.step()
    for k, optimizer in zip((0, 2), both, strict=True):
        own = {n for n, kind in optimizer.coverage.items() if kind == "kfac"}
        assert own == {f"{k}.weight", f"{k}.bias"}


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_compiled_model_makes_the_same_steps(fisher):
    """It is compiled once: steps that are captured run in eager mode."""
    make, x, y, _ = MODELS["mlp"]
    plain, inner, graphs = make(), make(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.compile(inner, backend=backend, fullgraph=True)
    curvature = Estimate(fisher, every=3)
    train(plain, KFAC(plain, curvature=curvature), x, y)
    train(model, KFAC(model, curvature=curvature), x, y)
    assert same_parameters(plain, inner)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_hooks_inside_a_compiled_model_keep_still(caplog):
    """A compiler would read them as a part of the model."""
    make, x, y, _ = MODELS["mlp"]
    inner = make()
    optimizer = KFAC(inner)
    train(torch.compile(inner, backend="eager", fullgraph=True), optimizer, x, y, steps=4)
    assert set(optimizer.coverage.values()) == {"adamw"}
    assert "torch.compile" in caplog.text
    torch.compiler.reset()
