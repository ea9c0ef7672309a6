"""When the tuner steps, what it records, and what it leaves alone."""

import pytest
import torch
from cases import build
from laws import Untouched
from marglik.small_networks import made, rows
from torch import nn

from kfac_laplace import Laplace, MarglikTuner

STRUCTURES = ("kron", "diag", "full")


def tuner_of(case, **options):
    return MarglikTuner(case.model, case.likelihood, 7, **options)


def values(tuner):
    return {name: value.detach().clone() for name, value in tuner.hyperparameters().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_schedule_burn_in_then_every_second_epoch():
    """Epochs are counted from 1; none before the burn-in is over, then each multiple of two."""
    case = build("mlp-tanh")
    tuner = tuner_of(case, n_epochs_burnin=3, marglik_frequency=2)
    due = [tuner.step(case.batches) is not None for _ in range(9)]
    epochs = [record.epoch for record in tuner.history]
    assert sum(due) == len(epochs)
    assert not any(due[:2])
    gaps = {b - a for a, b in zip(epochs, epochs[1:], strict=False)}
    assert gaps == {2}
    assert min(epochs) >= 3


def test_the_callers_epoch_counts():
    case = build("mlp-tanh")
    tuner = tuner_of(case, n_epochs_burnin=4, marglik_frequency=5)
    assert tuner.step(case.batches, epoch=1) is None
    assert tuner.step(case.batches, epoch=5).epoch == 5
    assert tuner.step(case.batches, epoch=7) is None
    assert tuner.step(case.batches, epoch=10).epoch == 10


def test_a_loader_that_is_not_due_is_not_read():
    case = build("mlp-tanh")
    tuner = tuner_of(case, n_epochs_burnin=10)

    def forbidden():
        raise AssertionError("read before it was due")
        yield

    assert tuner.step(forbidden()) is None
    assert tuner.history == [] or tuner.history == ()
    assert tuner.best is None


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "vit"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_record_is_the_evidence_of_a_posterior_with_its_hyperparameters(name, structure):
    case = build(name)
    tuner = tuner_of(case, hessian_structure=structure)
    record = tuner.step(case.batches)
    assert record is tuner.history[-1]
    expected_names = {"prior_precision"}
    if case.likelihood == "regression":
        expected_names.add("sigma_noise")
    assert set(record.hyperparameters) == expected_names
    options = dict(record.hyperparameters)
    la = Laplace(case.model, case.likelihood, hessian_structure=structure).fit(case.batches)
    evidence = la.log_marginal_likelihood(**options)
    torch.testing.assert_close(float(record.evidence), float(evidence), rtol=1e-9, atol=1e-8)
    for term in ("log_likelihood", "log_det_ratio", "scatter"):
        got, expected = float(getattr(record, term)), float(getattr(la, term))
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-8)
    assert record.seconds >= record.curvature_seconds >= 0


def test_records_are_frozen():
    case = build("mlp-tanh")
    record = tuner_of(case).step(case.batches)
    with pytest.raises(AttributeError):
        record.evidence = 0.0


@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "cnn"])
def test_hyper_steps_raise_the_evidence_of_a_fixed_model(name, method):
    """The weights do not move, so evidence after each step is that of the same posterior."""
    case = build(name)
    start = Laplace(case.model, case.likelihood).fit(case.batches).log_marginal_likelihood()
    tuner = tuner_of(case, method=method, n_hypersteps=20, prior_precision=1.0)
    evidences = [float(start)] + [float(tuner.step(case.batches).evidence) for _ in range(5)]
    assert evidences[1] > evidences[0] and evidences[-1] > evidences[1] - 1e-3
    assert float(tuner.best.evidence) == max(float(r.evidence) for r in tuner.history)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_two_rounds_of_five_steps_are_one_of_ten_on_a_fixed_model(name):
    """The hyper-optimiser's moments carry over from round to round."""
    case = build(name)
    once, twice = tuner_of(case, n_hypersteps=10), tuner_of(case, n_hypersteps=5)
    once.step(case.batches)
    twice.step(case.batches)
    twice.step(case.batches)
    for key, value in values(once).items():
        torch.testing.assert_close(values(twice)[key], value, rtol=1e-12, atol=0)


def test_best_is_the_record_of_highest_evidence():
    """Also when later weights are worse."""
    case = build("mlp-tanh")
    tuner = tuner_of(case, prior_precision=1.0)
    assert tuner.best is None
    first = tuner.step(case.batches)
    with torch.no_grad():
        case.model[0].weight.mul_(30)
    second = tuner.step(case.batches)
    assert float(second.evidence) < float(first.evidence)
    assert tuner.best is first


def test_model_and_optimiser_are_left_alone():
    case = build("vit")
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    tuner = tuner_of(case)
    tuner.loss(case.model(case.x), case.y).backward()
    optimizer.step()
    state = repr(optimizer.state_dict())
    for training in (True, False):
        case.model.train(training)
        photo = Untouched(case.model)
        tuner.step(case.batches)
        tuner.laplace(case.batches)
        photo.check()
    assert repr(optimizer.state_dict()) == state


def test_laplace_carries_the_hyperparameters():
    case = build("mlp-regression")
    tuner = tuner_of(
        case, prior_precision=3.0, temperature=0.7, prior_mean=0.1, kfac_approx="expand"
    )
    tuner.step(case.batches)
    la = tuner.laplace(case.batches)
    hyperparameters = tuner.hyperparameters()
    assert torch.equal(la.prior_precision.detach(), hyperparameters["prior_precision"])
    assert float(la.sigma_noise) == float(hyperparameters["sigma_noise"])
    record = tuner.history[-1]
    got = float(la.log_marginal_likelihood())
    assert got == pytest.approx(float(record.evidence), rel=1e-9)
    mean, covariance = la(case.x)
    assert torch.isfinite(mean).all() and torch.isfinite(covariance).all()


def train(case, tuner, optimizer, epochs):
    for _ in range(epochs):
        for x, y in case.batches:
            optimizer.zero_grad()
            tuner.loss(case.model(x), y).backward()
            optimizer.step()
        tuner.step(case.batches)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_interrupted_training_continues_identically(name, fisher, tmp_path):
    """state_dict restores hyperparameters, the hyper-optimiser, the schedule and the history."""
    options = {"fisher": fisher, "n_epochs_burnin": 2, "marglik_frequency": 2}

    def fresh():
        case = build(name)
        return case, tuner_of(case, **options), torch.optim.SGD(case.model.parameters(), 0.05)

    straight = fresh()
    train(*straight, 8)

    case, tuner, optimizer = fresh()
    train(case, tuner, optimizer, 5)
    torch.save(
        {"tuner": tuner.state_dict(), "model": case.model.state_dict()}, tmp_path / "state.pt"
    )
    resumed_case, resumed, resumed_optimizer = fresh()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed_case.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["tuner"])
    assert same(values(resumed), values(tuner))
    train(resumed_case, resumed, resumed_optimizer, 3)

    assert same(values(resumed), values(straight[1]))
    epochs = [[r.epoch for r in t.history] for t in (resumed, straight[1])]
    assert epochs[0] == epochs[1]
    evidences = [[float(r.evidence) for r in t.history] for t in (resumed, straight[1])]
    assert evidences[0] == evidences[1]
    assert float(resumed.best.evidence) == float(straight[1].best.evidence)
    for a, b in zip(resumed_case.model.parameters(), straight[0].model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_before_the_first_step():
    case = build("mlp-tanh")
    tuner = tuner_of(case, prior_precision=4.0)
    other = tuner_of(case)
    other.load_state_dict(tuner.state_dict())
    assert same(values(other), values(tuner))
    assert other.best is None
    other.step(case.batches)


def test_the_state_is_a_snapshot():
    case = build("mlp-tanh")
    tuner = tuner_of(case)
    tuner.step(case.batches)
    before, state, count = values(tuner), tuner.state_dict(), len(tuner.history)
    tuner.step(case.batches)
    assert not same(values(tuner), before)
    tuner.load_state_dict(state)
    assert same(values(tuner), before) and len(tuner.history) == count


@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_prior_structures_and_settings(prior, setting):
    case = build("cnn")
    tuner = tuner_of(case, prior_structure=prior, kfac_approx=setting)
    tuner.step(case.batches)
    count = tuner.hyperparameters()["prior_precision"].numel()
    assert count == (1 if prior == "scalar" else 3)  # two convolutions and the head


def test_a_count_that_contradicts_the_loader_is_said_once(caplog):
    """n_data weighs the prior in the loss: 7 seen where 700 were promised is a mistake."""
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, case.likelihood, 700)
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        tuner.step(case.batches)
        tuner.step(case.batches)
    assert len([record for record in caplog.records if "n_data=700" in record.getMessage()]) == 1


def test_a_state_is_a_snapshot_of_adams_moments_too():
    """Steps taken after the snapshot must not reach into it."""
    case = build("mlp-tanh")
    tuner = tuner_of(case)
    tuner.step(case.batches)
    state = tuner.state_dict()
    expected = [float(tuner.step(case.batches).evidence) for _ in range(3)]
    tuner.load_state_dict(state)
    assert [float(tuner.step(case.batches).evidence) for _ in range(3)] == expected


def test_initial_precisions_are_copied():
    case = build("mlp-tanh")
    delta = torch.tensor(2.0, dtype=torch.float64)
    tuner = tuner_of(case, prior_precision=delta)
    delta.mul_(100)
    assert float(tuner.hyperparameters()["prior_precision"]) == 2.0


@pytest.mark.parametrize("outputs, exact", [(5, True), (6, False)])
def test_rounds_draw_signs_where_an_example_has_many_outputs(outputs, exact):
    """Only where nothing is said of `fisher`; the posterior at the end is exact in any case."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, outputs).double(), torch.randn(30, 4).double()
    loader, found = [(x, torch.arange(30) % outputs)], {}
    for name, options in {"left out": {}, "exact": {"fisher": "exact"}}.items():
        tuner = MarglikTuner(model, "classification", 30, n_epochs_burnin=1, **options)
        tuner.loss(model(x), loader[0][1])
        found[name] = tuner.step(loader).log_det_ratio, tuner.laplace(loader).curvature
    assert (found["left out"][0] == found["exact"][0]) is exact
    assert found["left out"][0] == pytest.approx(found["exact"][0], rel=0.3)
    blocks = [curvature.blocks["weight"].dense() for _, curvature in found.values()]
    assert torch.equal(*blocks)


def test_a_tuner_tells_on_one_line_where_it_is():
    x, y = rows()
    model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)))
    tuner = MarglikTuner(model, "classification", len(y), n_epochs_burnin=3)
    assert repr(tuner) == "MarglikTuner(Categorical, 20 examples, epoch 0, waiting)"
    for _ in range(3):
        tuner.step([(x, y)])
    assert "evidence" in repr(tuner) and "in 1 rounds" in repr(tuner)
    assert f"{len(tuner.groups)} precisions tuned" in repr(tuner)
    assert "waiting" not in repr(tuner)
