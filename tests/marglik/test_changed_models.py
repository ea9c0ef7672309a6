"""Parameters that are added, removed, tied or moved while the tuner is at work."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pulls import (
    START,
    N,
    assert_laplace_agrees,
    assert_pulls,
    by_name,
    data,
    layer,
    network,
    tuner_of,
)
from torch import nn
from torch.nn.utils import parametrizations

from kfac_laplace.errors import UnsupportedUse


def frozen(model):
    model[2].requires_grad_(False)
    return {"2.weight": None, "2.bias": None}


def bias_frozen(model):
    model[2].bias.requires_grad_(False)
    return {"2.bias": None}


def bias_gone(model):
    model[2].bias = None
    return {"2.bias": None}


def layer_gone(model):
    model[2] = nn.Identity()
    return {"2.weight": None, "2.bias": None}


def layer_more(model):
    model.append(nn.Linear(2, 2).double())
    return {"5.weight": START, "5.bias": START}


def bias_more(model):
    """A module that had none: the weight's δ is the group's."""
    model[2].register_parameter("bias", None)
    model[2].bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    return {}


def tied(model):
    model[2].weight = model[0].weight
    return {"2.weight": None}


def weight_norm(model):
    parametrizations.weight_norm(model[2])
    new = {f"2.parametrizations.weight.original{k}": START for k in (0, 1)}
    return {"2.weight": None, **new}


def orthogonal(model):
    parametrizations.spectral_norm(model[2])
    return {"2.weight": None, "2.parametrizations.weight.original": START}


def assigned(model):
    model.load_state_dict(network().state_dict(), assign=True)
    return {}


def replaced(model):
    model[2] = nn.Linear(3, 3).double()
    return {}


def wider(model):
    """Another shape under the same names is another layer."""
    model[2], model[4] = nn.Linear(3, 5).double(), nn.Linear(5, 2).double()
    return {"2.weight": START, "2.bias": START, "4.weight": START}


CHANGES = [frozen, bias_frozen, bias_gone, layer_gone, layer_more, bias_more, tied]
CHANGES += [weight_norm, orthogonal, assigned, replaced]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("joint_bias", [False])
def test_any_change_of_the_model(change, joint_bias):
    """δ goes on by name: each tensor has its own here, so that none is drawn along by another."""
    model, (x, y) = network(), data()
    tuner = tuner_of(model, joint_bias=joint_bias, hessian_structure="diag")
    tuner.step([(x, y)])
    want = by_name(tuner)
    tuner.loss(model(x), y)
    want |= change(model)
    want = {name: delta for name, delta in want.items() if delta is not None}
    if change in (weight_norm, orthogonal):
        model.eval()  # power iterations move in training mode
    assert_pulls(tuner, model, want, x, y)
    assert_laplace_agrees(tuner, want, x, y)
    tuner.step([(x, y)])
    assert_pulls(tuner, model, by_name(tuner), x, y)


def test_layers_in_another_order():
    """The same names behind one another in another way: precisions follow their names."""
    model, (x, y) = network(), data()
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    found = by_name(tuner)
    head = model[4]
    first = model._modules.pop("0")
    model.forward = lambda x: head(model[1](model[0](first(x).tanh())))  # now "2" is the first
    model._modules["0"] = first
    want = {n: d for g, d in found.items() for n in layer(g.split(".")[0], d)}
    assert_pulls(tuner, model, want, x, y)
    assert_laplace_agrees(tuner, want, x, y)


def test_a_model_that_wants_whole_batches():
    """What a few examples cannot show, `prepare` does."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            if len(x) < N:
                raise RuntimeError("static shapes")
            return self.net(x)

    model, (x, y) = Whole(), data()
    model.net[0].requires_grad_(False)
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    model.net[0].requires_grad_(True)
    for _ in range(2):
        with pytest.raises(UnsupportedUse, match=r"static shapes.*prepare"):
            tuner.loss(model(x), y)
    tuner.prepare([(x, y)])
    tuner.loss(model(x), y)
    assert len(tuner.groups) == 3


def test_a_layer_of_another_shape_starts_anew():
    model, (x, y) = network(), data()
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    found = by_name(tuner)
    wider(model)
    want = layer(0, found["0.weight"]) | layer(2, START) | layer(4, found["4.weight"])
    assert_pulls(tuner, model, want, x, y)  # the last bias has its shape still, and a joint δ
    assert_laplace_agrees(tuner, want, x, y)


def test_a_model_in_another_precision():
    model, (x, y) = network(), data()
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    deltas = {n: d for g, d in by_name(tuner).items() for n in layer(g.split(".")[0], d)}
    model.float()
    named = dict(model.named_parameters())
    got = torch.autograd.grad(tuner.loss(model(x.float()), y), [*named.values()])
    fit = torch.autograd.grad(F.cross_entropy(model(x.float()), y), [*named.values()])
    for (name, p), g, f in zip(named.items(), got, fit, strict=True):
        torch.testing.assert_close(g, (f + deltas[name] * p.detach() / N).float())
    model.bfloat16()
    assert tuner.loss(model(x.bfloat16()), y).dtype == torch.float32


def test_the_model_is_left_alone_by_regrouping():
    """Also in the middle of a training step: modes, gradients, buffers, the caller's graph."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()
    x, y = data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    model[0].requires_grad_(True)
    model.train()
    output = model(x)
    state, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tuner.loss(output, y).backward()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(draws, torch.get_rng_state())
    assert model.training and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["mapping", "generator"])
def test_loaders_of_other_kinds(kind):
    """What is kept of them is a few examples, whatever they yield."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

    model, (x, y) = Named(), data()
    model.net[0].requires_grad_(False)
    tuner = tuner_of(model)
    batch = {"x": x, "labels": y} if kind == "mapping" else (x, y)
    tuner.step(iter([batch]) if kind == "generator" else [batch])
    found = tuner.hyperparameters()["prior_precision"]
    model.net[0].requires_grad_(True)
    tuner.loss(model(x), y)
    got = tuner.hyperparameters()["prior_precision"]
    assert torch.equal(got[1:], found) and float(got[0]) == START
