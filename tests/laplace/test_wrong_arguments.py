"""Arguments of a wrong kind, files of another kind, and what loading advises: all said by name."""

from __future__ import annotations

import io
import tempfile

import pytest
import torch
from cases import build
from torch import nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.states.plain import CHECKSUM, sealed


@pytest.fixture
def case():
    return build("mlp-tanh")


@pytest.fixture
def la(case) -> Laplace:
    return Laplace(case.model, "classification").fit(case.batches)


TARGET_KEYS = {
    "Laplace": lambda m, b: Laplace(m, dict_key_y=3),
    "tuner": lambda m, b: MarglikTuner(m, "classification", 7, dict_key_y=3),
    "training": lambda m, b: marglik_training(m, b, n_epochs=0, dict_key_y=3),
    "curvature": lambda m, b: Curvature(m, "classification").fit(b, key_y=3),
}


@pytest.mark.parametrize("ask", TARGET_KEYS)
def test_a_target_key_is_a_string(ask, case):
    with pytest.raises(InvalidType, match="key_y: not a string. got 3"):
        TARGET_KEYS[ask](case.model, case.batches)


def test_what_to_do_is_said_once(la, tmp_path):
    state = la.state_dict()
    state["options"]["dict_key_y"] = 3
    torch.save(sealed({k: v for k, v in state.items() if k != CHECKSUM}), tmp_path / "la.pt")
    with pytest.raises(InvalidValue, match="dict_key_y: not a string") as caught:
        Laplace.load(tmp_path / "la.pt", la.model)
    assert str(caught.value).count("fit and save again") == 1


LOADERS = {
    "loo": ("loader", lambda la: la.calibrate(3)),
    "validation": ("loader", lambda la: la.calibrate(3, "validation")),
    "val_loader": ("val_loader", lambda la: la.optimize_prior("gridsearch", val_loader=3)),
    "fit": ("train_loader", lambda la: la.fit(3)),
    "training": ("train_loader", lambda la: marglik_training(la.model, 3)),
}


@pytest.mark.parametrize("ask", LOADERS)
def test_a_loader_is_an_iterable(ask, la):
    where, call = LOADERS[ask]
    with pytest.raises(InvalidType, match=f"^{where}: not an iterable of batches. got int"):
        call(la)


def test_a_grid_is_an_iterable(la, case):
    with pytest.raises(InvalidType, match="^grid: not an iterable of prior precisions"):
        la.optimize_prior("gridsearch", val_loader=case.batches, grid=3)


def test_files_that_are_open_for_text(la, tmp_path):
    with tempfile.NamedTemporaryFile("w+") as passing, (tmp_path / "a").open("w+") as text:
        for file in (io.StringIO(), text, passing):
            with pytest.raises(InvalidType, match="path: .*open for bytes.*BytesIO"):
                la.save(file)
            with pytest.raises(InvalidType, match="path: .*open for bytes"):
                Laplace.load(file, la.model)
    with tempfile.NamedTemporaryFile("w+b") as passing:
        la.save(passing)
        passing.seek(0)
        Laplace.load(passing, la.model)


def test_states_of_another_kind_are_called_by_it(la, case):
    tuner = MarglikTuner(case.model, "classification", 7)
    states = {"tuner": tuner.state_dict(), "curvature": la.curvature.state_dict()}
    for kind, state in states.items():
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        says = f"not the state of a Laplace posterior. got the state of a {kind}"
        with pytest.raises(InvalidValue, match=says):
            Laplace.load(file, case.model)
    with pytest.raises(InvalidValue, match="not the state of a tuner.*a Laplace posterior"):
        tuner.load_state_dict(la.state_dict())


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_temperature_can_be_set(structure):
    case = build("mlp-regression")
    options = {"hessian_structure": structure, "sigma_noise": 0.7}
    want = Laplace(case.model, "regression", temperature=0.5, **options).fit(case.batches)
    for set_first in (True, False):
        got = Laplace(case.model, "regression", **options)
        if set_first:
            got.temperature = 0.5
        got.fit(case.batches)
        got.temperature = torch.tensor(0.5)
        assert torch.equal(got.temperature, want.temperature)
        assert torch.equal(got.log_marginal_likelihood(), want.log_marginal_likelihood())
        assert all(map(torch.equal, got(case.x), want(case.x)))
    with pytest.raises(InvalidValue, match="temperature"):
        got.temperature = 0.0
    with pytest.raises(InvalidType, match="temperature"):
        got.temperature = "hot"
    assert float(got.temperature) == 0.5


@pytest.mark.parametrize("name", ["temperature", "posterior_scale", "sigma_noise"])
def test_what_loading_advises_can_be_done(name, tmp_path):
    case = build("mlp-regression")
    la = Laplace(case.model, "regression").fit(case.batches)
    la.save(tmp_path / "la.pt")
    with pytest.raises(InvalidValue, match=rf"holds this already.*la\.{name} = value"):
        Laplace.load(tmp_path / "la.pt", case.model, **{name: 0.5})
    again = Laplace.load(tmp_path / "la.pt", case.model)
    setattr(again, name, 0.5)
    assert float(getattr(again, name)) == 0.5


def norms(inference: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.inference_mode(inference):
        model[1].running_mean = torch.full((4,), 0.3, dtype=torch.float64)
        model[1].running_var = torch.full((4,), 1.7, dtype=torch.float64)
    return model


def test_buffers_of_inference_mode():
    torch.manual_seed(1)
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2
    models = [norms(True), norms(False)]
    held = models[0][1].running_mean
    found = []
    for model in models:
        la = Laplace(model).fit([(x, y)])
        ways = [la(x), la(x, pred_type="linear"), la(x, pred_type="nn")]
        found.append([*ways, la.calibrate().posterior_scale, la.log_marginal_likelihood()])
    assert models[0][1].running_mean is held and held.is_inference()
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
