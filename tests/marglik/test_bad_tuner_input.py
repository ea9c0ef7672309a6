"""Bad input raises a clear error and leaves the tuner, its history and the model as they were."""

import pytest
import torch
from cases import build
from laws import Untouched

from kfac_laplace import KfacLaplaceError, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue


def stepped(name="mlp-tanh"):
    case = build(name)
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    tuner.step(case.batches)
    return tuner, case


def snapshot(tuner):
    return (
        {k: v.tolist() for k, v in tuner.hyperparameters().items()},
        [float(r.evidence) for r in tuner.history],
        repr(tuner.state_dict()),
    )


def nan_loader(case):
    yield case.batches[0]
    yield torch.full_like(case.batches[1][0], torch.nan), case.batches[1][1]


def wrong_labels(case):
    yield case.batches[0]
    yield case.batches[1][0], case.batches[1][1] + 100


def float_labels(case):
    yield case.batches[0][0], case.batches[0][1].double()


def nothing(case):
    yield from ()


@pytest.mark.parametrize(
    ("loader", "error"),
    [
        (nan_loader, InvalidValue),
        (wrong_labels, InvalidValue),
        (float_labels, InvalidType),
        (nothing, InvalidValue),
    ],
)
def test_a_failed_step_changes_nothing(loader, error):
    tuner, case = stepped()
    before, photo = snapshot(tuner), Untouched(case.model)
    with pytest.raises(error):
        tuner.step(loader(case))
    assert snapshot(tuner) == before
    photo.check()
    tuner.step(case.batches)  # and the next one works


def test_a_failed_step_does_not_disturb_what_follows():
    """The same records as if the bad loader had never been."""
    tuner, case = stepped()
    with pytest.raises(InvalidValue):
        tuner.step(nan_loader(case))
    undisturbed, other = stepped()
    got, expected = tuner.step(case.batches), undisturbed.step(other.batches)
    assert float(got.evidence) == float(expected.evidence)
    assert got.epoch == expected.epoch


def test_non_finite_weights():
    tuner, case = stepped()
    before = snapshot(tuner)
    with torch.no_grad():
        case.model[0].weight[0, 0] = torch.nan
    with pytest.raises(InvalidValue, match="finite"):
        tuner.step(case.batches)
    assert snapshot(tuner) == before


@pytest.mark.parametrize(
    ("output", "target", "error"),
    [
        (torch.zeros(3, 3), torch.zeros(3), InvalidType),
        (torch.zeros(3, 3), torch.full((3,), 3), InvalidValue),
        (torch.zeros(3, 3), torch.zeros(2, dtype=torch.long), InvalidValue),
    ],
)
def test_bad_targets_in_the_loss(output, target, error):
    tuner, _ = stepped()
    with pytest.raises(error, match="target"):
        tuner.loss(output, target)


def test_a_step_that_is_due_needs_a_loader():
    tuner, _ = stepped()
    before = snapshot(tuner)
    with pytest.raises(KfacLaplaceError, match="loader"):
        tuner.step()
    assert snapshot(tuner) == before


BAD_OPTIONS = {
    "likelihood": "poison",
    "n_data": 0,
    "prior_structure": "layers",
    "prior_precision": -1.0,
    "sigma_noise": 0.0,
    "temperature": -0.5,
    "kfac_approx": "expnd",
    "fisher": "exakt",
    "n_epochs_burnin": -1,
    "marglik_frequency": 0,
    "n_hypersteps": 0,
    "lr_hyp": 0.0,
    "method": "magic",
    "hessian_structure": "krno",
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_out_of_range_name_the_option(name):
    options = {"likelihood": "regression", "n_data": 7, name: BAD_OPTIONS[name]}
    with pytest.raises(InvalidValue, match=name):
        MarglikTuner(build("mlp-regression").model, **options)


def test_a_model_is_a_module():
    with pytest.raises(InvalidType, match="model"):
        MarglikTuner(lambda x: x, "classification", 7)


@pytest.mark.parametrize("state", [{}, {"history": []}, {"weight": torch.zeros(2)}])
def test_nonsense_states(state):
    tuner, _ = stepped()
    before = snapshot(tuner)
    with pytest.raises(KfacLaplaceError):
        tuner.load_state_dict(state)
    assert snapshot(tuner) == before


def test_a_state_of_another_model():
    tuner, _ = stepped()
    before = snapshot(tuner)
    other, _ = stepped("cnn")  # three layers, not two
    with pytest.raises(KfacLaplaceError):
        tuner.load_state_dict(other.state_dict())
    assert snapshot(tuner) == before


def test_kron_refuses_a_diagonal_prior():
    with pytest.raises(KfacLaplaceError, match="layerwise"):
        MarglikTuner(build("mlp-tanh").model, "classification", 7, prior_structure="diag")


def tampered(state, change):
    state = {**state, "hyperparameters": dict(state["hyperparameters"])}
    change(state)
    return state


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["hyperparameters"].update(prior_precision=torch.ones(5).double()),
        lambda s: s["hyperparameters"].update(prior_precision=-torch.ones(2).double()),
        lambda s: s["hyperparameters"].pop("sigma_noise"),
        lambda s: s.update(history=[{"epoch": 1}]),
        lambda s: s.update(groups=[{"nonsense": 1}]),
    ],
    ids=["length", "sign", "missing value", "record", "groups"],
)
def test_tampered_states(change):
    """A file cut short or edited by hand is refused before anything of it is taken over."""
    tuner, case = stepped()
    other, _ = stepped()
    other.step(case.batches)
    before = snapshot(tuner)
    with pytest.raises(KfacLaplaceError):
        tuner.load_state_dict(tampered(other.state_dict(), change))
    assert snapshot(tuner) == before
    tuner.step(case.batches)


def test_a_state_of_another_prior_structure():
    tuner, _ = stepped()
    case = build("mlp-tanh")
    scalar = MarglikTuner(case.model, "classification", 7, prior_structure="scalar")
    scalar.step(case.batches)
    before = snapshot(scalar)
    with pytest.raises(KfacLaplaceError):
        scalar.load_state_dict(tuner.state_dict())
    assert snapshot(scalar) == before


def test_a_vector_of_precisions_before_the_first_batch_asks_for_prepare():
    """Which entry belongs to which layer shows only when the model is used."""
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, "classification", 7, prior_precision=torch.ones(2))
    with pytest.raises(InvalidValue, match="prepare"):
        tuner.loss(case.model(case.x), case.y)
    tuner.prepare(case.batches)
    tuner.loss(case.model(case.x), case.y)
    wrong = MarglikTuner(case.model, "classification", 7, prior_precision=torch.ones(5))
    with pytest.raises(InvalidValue, match="2 precisions"):
        wrong.step(case.batches)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("n_data", 2.5, InvalidType),
        ("n_hypersteps", "ten", InvalidType),
        ("lr_hyp", float("nan"), InvalidValue),
        ("lr_hyp", "fast", InvalidType),
        ("method", 3, InvalidValue),
    ],
)
def test_options_of_a_wrong_kind(name, value, error):
    case = build("mlp-tanh")
    options = {"n_data": 7, name: value}
    with pytest.raises(error, match=name):
        MarglikTuner(case.model, case.likelihood, **options)


def test_a_mean_for_each_parameter_is_called_by_its_name():
    case = build("mlp-tanh")
    mean = torch.zeros(sum(p.numel() for p in case.model.parameters()), dtype=torch.float64)
    tuner = MarglikTuner(case.model, "classification", 7, prior_mean=mean)
    with pytest.raises(InvalidValue, match="^prior_mean: which parameters belong to which mean"):
        tuner.loss(case.model(case.x), case.y)
    wrong = MarglikTuner(case.model, "classification", 7, prior_mean=torch.ones(5))
    with pytest.raises(InvalidValue, match="^prior_mean"):
        wrong.prepare(case.batches)
    with pytest.raises(InvalidValue, match="^prior_mean"):
        wrong.loss(case.model(case.x), case.y)
