"""Records as plain numbers: strict JSON, curves by name, a picture that is replaced as a whole."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from cases import build

from kfac_laplace import MarglikTuner
from kfac_laplace.errors import MissingPackage
from kfac_laplace.marglik.record import Record, add_scalars


def tuner_after(rounds=2, name="mlp-regression", **options):
    case = build(name)
    tuner = MarglikTuner(case.model, case.likelihood, 7, n_epochs_burnin=1, **options)
    for _ in range(rounds):
        tuner.step(case.batches)
    return tuner


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_saved_history_is_the_history(tmp_path):
    tuner, path = tuner_after(), tmp_path / "history.json"
    path.write_text("what was there before")
    tuner.save_history(path)
    stored = strict(path.read_text())
    assert [path] == [*tmp_path.iterdir()]
    assert [set(entry) for entry in stored] == [{field.name for field in fields(Record)}] * 2
    for entry, record in zip(stored, tuner.history, strict=True):
        assert entry["evidence"] == record.evidence
        delta = record.hyperparameters["prior_precision"].tolist()
        names = entry["hyperparameters"]["prior_precision"]
        assert names == dict(zip(record.groups, delta, strict=True))
        sigma = record.hyperparameters["sigma_noise"]
        assert entry["hyperparameters"]["sigma_noise"] == float(sigma)


def test_what_is_not_finite_is_null(tmp_path):
    tuner = tuner_after(1)
    tuner.history[0] = replace(tuner.history[0], constant_evidence=math.nan, objective=-math.inf)
    tuner.save_history(tmp_path / "history.json")
    (entry,) = strict((tmp_path / "history.json").read_text())
    assert entry["constant_evidence"] is None and entry["objective"] is None


@pytest.mark.parametrize("structure", ["scalar", "unit", "diag"])
def test_other_priors_are_plain_as_well(structure):
    options = {"hessian_structure": "diag"} if structure != "scalar" else {}
    record = tuner_after(1, prior_structure=structure, **options).history[0]
    delta = record.hyperparameters["prior_precision"]
    plain = record.to_dict()["hyperparameters"]["prior_precision"]
    curves = record.scalars()
    if structure == "scalar":
        assert plain == curves["prior_precision"] == float(delta)
    else:
        assert plain == delta.tolist()
        assert curves["prior_precision/min"] == float(delta.min())
        assert curves["prior_precision/max"] == float(delta.max())


def test_curves_come_back_from_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tuner = tuner_after()
    with SummaryWriter(tmp_path) as writer:
        add_scalars(writer, tuner.history)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert len(events.Tags()["scalars"]) == len(tuner.history[0].scalars())
    points = events.Scalars("marglik/evidence")
    assert [point.step for point in points] == [record.epoch for record in tuner.history]
    for point, record in zip(points, tuner.history, strict=True):
        assert point.value == pytest.approx(record.evidence, rel=1e-6)  # single precision


def test_a_live_plot_replaces_its_file(tmp_path):
    pytest.importorskip("matplotlib")
    from kfac_laplace.plots import LivePlot

    tuner, path = tuner_after(), tmp_path / "now.png"
    live = LivePlot(path)
    live([])
    assert not path.exists()
    live(tuner.history[:1])
    first = path.read_bytes()
    live(tuner.history)
    assert path.read_bytes() != first and path.read_bytes().startswith(b"\x89PNG")
    assert [path] == [*tmp_path.iterdir()]
    few = replace(tuner.history[0], groups=(), hyperparameters={"sigma_noise": torch.tensor(2.0)})
    live([*tuner.history, few])  # groups that come and go


def test_a_live_plot_without_a_path_asks_for_a_notebook():
    pytest.importorskip("matplotlib")
    from kfac_laplace.plots import LivePlot

    try:
        import IPython  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackage, match="Pass a path"):
            LivePlot()
    else:
        live = LivePlot()
        live(tuner_after(1).history)
        live(tuner_after(2).history)
