"""Shared curvature: states of a tuner that has it, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from marglik.shared_rounds import batches, epoch, mlp, pair, problem
from marglik.small_networks import made

from kfac_laplace import MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.optim import KFAC, Estimate
from kfac_laplace.states.plain import same, sealed

# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normed", "regression"])
def test_a_resumed_run_goes_on_bit_by_bit(name):
    """Stopped in the middle of an epoch whose round makes no pass."""

    def run(model, optimizer, tuner, loader, first):
        for x, y in loader[first:]:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        records = [tuner.step()]
        epoch(model, optimizer, tuner, loader)
        records.append(tuner.step())
        return [
            [r.evidence, r.log_det_ratio, r.hyperparameters, r.effective_dimensions]
            for r in records
        ]

    model, likelihood, data = problem(name)
    loader, estimate = batches(*data), Estimate(every=1)
    optimizer, tuner = pair(model, likelihood, 20, lr=1e-2, estimate=estimate)
    epoch(model, optimizer, tuner, loader)
    tuner.step(loader)
    epoch(model, optimizer, tuner, loader[:1])
    states = copy.deepcopy([one.state_dict() for one in (model, optimizer, tuner)])
    want = run(model, optimizer, tuner, loader, 1)
    other, _, _ = problem(name)
    again = pair(other, likelihood, 20, lr=1e-2, estimate=estimate)
    for one, state in zip((other, *again), states, strict=True):
        one.load_state_dict(state)
    assert same(run(other, *again, loader, 1), want)


def test_a_state_goes_to_tuners_without_and_comes_from_them():
    model, likelihood, data = problem("normed")
    loader = batches(*data)
    optimizer, tuner = pair(model, likelihood, 20)
    tuner.step(loader)
    epoch(model, optimizer, tuner, loader)
    tuner.step()
    plain = MarglikTuner(model, likelihood, 20, n_epochs_burnin=1, fisher="exact")
    plain.load_state_dict(tuner.state_dict())
    assert [record.shared for record in plain.history] == [False, True]
    assert plain.state_dict()["shared"] is None
    tuner.load_state_dict(plain.state_dict())
    with pytest.raises(InvalidValue, match="needs a pass over the data"):
        tuner.step()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("last_pass", "blocks"), {"nine": {}}, "no group of that name"),
        (("last_pass", "unused"), ["nine"], "not some of the trainable parameters"),
        (("last_pass", "n_rows"), 0, "a pass over no data"),
        (("last_pass", "targets"), torch.ones(5, 3), r"shape \(2, 3 or less\) is needed"),
        (("epoch", "statistic"), "x", "not a tensor"),
        (("epoch", "rows"), torch.ones(2), r"shape \(\) is needed"),
    ],
    ids=str,
)
def test_faults_of_a_state_are_told_by_their_place(path, value, says):
    model, likelihood, data = problem("normed")
    loader = batches(*data)
    optimizer, tuner = pair(model, likelihood, 20)
    tuner.step(loader)
    epoch(model, optimizer, tuner, loader)
    state = copy.deepcopy(tuner.state_dict())
    state["shared"][path[0]][path[1]] = value
    before = repr(tuner.state_dict())
    with pytest.raises(InvalidValue, match=says):
        tuner.load_state_dict(sealed(state))
    assert repr(tuner.state_dict()) == before


# --- refused --------------------------------------------------------------------------------------


def test_what_a_round_without_a_pass_needs():
    model, likelihood, data = problem("normed")
    loader = batches(*data)
    optimizer, tuner = pair(model, likelihood, 20)
    epoch(model, optimizer, tuner, loader)
    with pytest.raises(InvalidValue, match="no pass over the data was made with these param"):
        tuner.step()
    assert tuner.step(loader).epoch == 1
    with pytest.raises(InvalidValue, match="no loss was computed in this epoch"):
        tuner.step()
    model[0].requires_grad_(False)
    epoch(model, optimizer, tuner, loader)
    with pytest.raises(InvalidValue, match="no pass over the data was made with these param"):
        tuner.step()
    assert tuner.step(loader).epoch == 2


def test_a_round_needs_factors():
    model, likelihood, data = problem("mlp")
    _, tuner = pair(model, likelihood, 20)
    tuner.step(batches(*data))
    tuner.loss(model(data[0]), data[1])
    with pytest.raises(NotFitted, match="no factors yet"):
        tuner.step()


def test_objectives_that_look_at_the_data_need_a_pass():
    model, likelihood, data = problem("mlp")
    loader = batches(*data)
    optimizer, tuner = pair(model, likelihood, 20, objective="exact")
    tuner.step(loader)
    epoch(model, optimizer, tuner, loader)
    with pytest.raises(InvalidValue, match="this objective needs the training data once more"):
        tuner.step()
    assert len(tuner.history) == 1 and tuner.step(loader).epoch == 2


def test_a_tuner_without_such_an_optimiser_needs_a_loader():
    model, likelihood, data = problem("mlp")
    tuner = MarglikTuner(model, likelihood, 20, n_epochs_burnin=1)
    tuner.step(batches(*data))
    with pytest.raises(InvalidValue, match="a round is due"):
        tuner.step()


def other_model(model):
    return KFAC(copy.deepcopy(model), weight_decay=0)


def named(value):
    """What is said names a case; functions would by their address."""
    return value[:30] if isinstance(value, str) else None


REFUSED = [
    (other_model, {}, "an optimiser of another model"),
    (lambda m: KFAC(m, "regression", weight_decay=0), {}, "Gaussian in the optimiser"),
    (lambda m: KFAC(m, weight_decay=0, curvature=Estimate("empirical")), {}, "empirical Fisher"),
    (lambda m: KFAC(m), {}, r"weight_decay=0\.01 in the optimiser"),
    (lambda m: KFAC(m, weight_decay=0), {"hessian_structure": "diag"}, "structure='diag'"),
    (lambda m: KFAC(m, weight_decay=0), {"joint_bias": False}, "joint_bias=False"),
]


@pytest.mark.parametrize(("optimiser", "options", "says"), REFUSED, ids=named)
def test_another_curvature_is_refused(optimiser, options, says):
    model = made(mlp)
    with pytest.raises(InvalidValue, match=f"curvature: not the curvature of.*{says}"):
        MarglikTuner(model, "classification", 20, curvature=optimiser(model), **options)


def test_another_optimiser_is_refused():
    model = made(mlp)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(InvalidType, match="Pass a kfac_laplace.optim.KFAC"):
        MarglikTuner(model, "classification", 20, curvature=adam)


def test_other_settings_are_told_once(caplog):
    model, likelihood, data = problem("transformer")
    loader = batches(*data)
    optimizer, tuner = pair(model, likelihood, 20, kfac_approx="expand")
    tuner.step(loader)
    for _ in range(2):
        epoch(model, optimizer, tuner, loader)
        assert tuner.step().shared
    told = [r for r in caplog.records if "by other settings" in r.message]
    assert len(told) == 1 and "embed.weight (reduce, not expand)" in told[0].message
