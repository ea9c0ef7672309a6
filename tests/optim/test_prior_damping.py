"""Damping by the precisions of the prior, which a tuner chooses."""

from __future__ import annotations

import pytest
import torch
from marglik.small_networks import made, rows
from torch import nn

from kfac_laplace import MarglikTuner
from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim import KFAC, Damped, EigenAdam, Estimate, ExactDamping

#: Factors of the step itself.
NOW = Estimate("exact", every=1, bases_every=1, ema=0)


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_the_damping_is_what_the_prior_adds_to_the_curvature():
    model, (x, y) = made(mlp), rows()
    tuner = MarglikTuner(model, "classification", 20, prior_precision=3.0, n_epochs_burnin=1)
    names = [name for name, _ in model.named_parameters()]
    assert tuner.damping() == dict.fromkeys(names, 3.0 / 20)
    record = tuner.step([(x, y)])
    delta = dict(zip(record.groups, record.hyperparameters["prior_precision"] / 20, strict=True))
    found = tuner.damping()
    assert [*found] == names and len({*found.values()}) == 2
    for weight, bias in (("0.weight", "0.bias"), ("2.weight", "2.bias")):
        assert found[weight] == found[bias] == pytest.approx(float(delta[weight]), rel=1e-14)


def test_the_damping_with_a_noise_and_a_temperature():
    """H/(N σ² T) + δ/N is 1/(σ² T) times H/N + λ."""
    options = {"prior_precision": 3.0, "sigma_noise": 0.5, "temperature": 2.0}
    tuner = MarglikTuner(made(mlp), "regression", 20, **options)
    assert {*tuner.damping().values()} == {3.0 * 0.25 * 2.0 / 20}


def test_steps_take_the_damping_of_the_tuner():
    """One step is that of `Damped` with the number δ/N = 3/20."""
    (x, y), steps = rows(), {}
    for how in ("tuner", "number", "default"):
        model, rule = made(mlp), Damped(0.15, momentum=0, length=None)
        if how != "number":
            rule = Damped(momentum=0, length=None)
        optimizer = KFAC(model, lr=0.1, weight_decay=0, rule=rule)
        tuner = MarglikTuner(model, "classification", 20, prior_precision=3.0)
        if how == "tuner":
            optimizer.damped_by(tuner)
        optimizer.zero_grad()
        tuner.loss(model(x), y).backward()
        optimizer.step()
        steps[how] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(steps["tuner"], steps["number"])
    assert not torch.allclose(steps["tuner"], steps["default"])


def test_a_rule_without_damping_is_refused():
    model = made(mlp)
    optimizer = KFAC(model, rule=EigenAdam())
    tuner = MarglikTuner(model, "classification", 20)
    with pytest.raises(InvalidValue, match="the rule has no damping"):
        optimizer.damped_by(tuner)


def test_after_a_round_steps_take_its_precisions():
    """By formula: (B ⊗ A + λ)⁻¹ G from the factors of the step, exactly damped, λ = δ/N.

    The bases of single precision are accurate to 1e-8 at this damping.
    """
    (x, y), model = rows(), made(mlp)
    rule = Damped(ExactDamping(), momentum=0, length=None)
    optimizer = KFAC(model, lr=1.0, weight_decay=0, rule=rule, curvature=NOW)
    options = {"prior_precision": 3.0, "n_epochs_burnin": 1}
    tuner = MarglikTuner(model, "classification", 20, **options)
    optimizer.damped_by(tuner)
    record = tuner.step([(x, y)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuner.loss(model(x), y).backward()
    optimizer.step()
    blocks = optimizer.curvature(1).blocks
    for name, delta in zip(record.groups, record.hyperparameters["prior_precision"], strict=True):
        own = dict(model.named_parameters())
        pair = (name, name.replace("weight", "bias"))
        packed = {n: own[n].grad for n in pair}
        block = blocks[name]
        a, b = block.factors
        matrix = torch.kron(b[0], a[0]) + delta / 20 * torch.eye(block.layout.size)
        direction = torch.linalg.solve(matrix, block.layout.pack(packed).flatten())
        steps = {n: before[n] - own[n].detach() for n in pair}
        want = block.layout.unpack(direction.reshape(block.layout.matrix))
        for n in pair:
            torch.testing.assert_close(steps[n], want[n], rtol=1e-6, atol=1e-9)
