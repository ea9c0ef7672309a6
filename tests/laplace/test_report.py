"""`report`, `summary` and `repr`: numbers by other means, and tables that line up."""

import json

import pytest
import torch
from cases import build
from posterior import dense

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.posterior.scores import ClassScores, auroc

functional = pytest.importorskip("torchmetrics.functional.classification")


def labels(case):
    y = case.model(case.x).detach().argmax(1)
    return torch.cat([y[:4], (y[4:] + 1) % 3])


def test_scores_of_classes_are_those_of_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(200, 4, generator=draw).double()).softmax(-1)
    y = torch.randint(4, (200,), generator=draw)
    got = ClassScores.of(probs, y).summary()
    ece = functional.multiclass_calibration_error(probs, y, num_classes=4, n_bins=15, norm="l1")
    assert got["ece"] == pytest.approx(float(ece), rel=1e-6)
    assert got["accuracy"] == pytest.approx(float((probs.argmax(1) == y).double().mean()))
    assert got["nll"] == pytest.approx(float(torch.nn.functional.nll_loss(probs.log(), y)))
    onehot = torch.nn.functional.one_hot(y, 4)
    assert got["brier"] == pytest.approx(float((probs - onehot).square().sum(1).mean()))


def test_the_area_is_that_of_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    usual, strange = (
        torch.randint(9, (n,), generator=draw) / 10 + s for n, s in ((50, 0), (30, 0.1))
    )
    want = functional.binary_auroc(torch.cat([usual, strange]), torch.arange(80).ge(50).int())
    assert auroc(usual, strange) == pytest.approx(float(want), rel=1e-6)


def test_classification():
    la, case = dense.fit("mlp-tanh")
    y, held_out = labels(case), [(case.x + 0.1, labels(case))]
    la.calibrate(held_out, "validation")
    report = la.report([(case.x[:3], y[:3]), (case.x[3:], y[3:])])
    mode, cooled, posterior, centred = report.rows
    f = case.model(case.x).detach()
    assert mode["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(f, y)))
    assert mode["accuracy"] == pytest.approx(4 / 7) and cooled["accuracy"] == mode["accuracy"]
    for row, link in ((posterior, "auto"), (centred, "centred")):
        p = la(case.x, link_approx=link)
        assert row["nll"] == pytest.approx(float(torch.nn.functional.nll_loss(p.log(), y)))
        assert row["confidence"] == pytest.approx(float(p.amax(1).mean()))
    assert "temperature" in cooled["prediction"]


def test_without_held_out_data_nothing_is_said_of_a_temperature():
    la, case = dense.fit("mlp-tanh")
    names = [row["prediction"] for row in la.report([(case.x, labels(case))]).rows]
    assert len(names) == 3 and not any("temperature" in name for name in names)
    given = la.report([(case.x, labels(case))], val_loader=[(case.x, labels(case))])
    assert len(given.rows) == 4


def test_strange_inputs_are_told_by_the_score():
    la, case = dense.fit("mlp-tanh")
    strange = 10 * case.x
    report = la.report([(case.x, labels(case))], ood_loader=[strange[:3], (strange[3:], None)])
    usual, others = la.predict(case.x).ood_score, la.predict(strange).ood_score
    found = {row["prediction"]: row["auroc"] for row in report.rows}
    assert found["posterior, auto (the network's own)"] == pytest.approx(auroc(usual, others))


def test_regression():
    la, case = dense.fit("mlp-regression", sigma_noise=0.7)
    mode, posterior = la.report([(case.x, case.y)]).rows
    f = case.model(case.x).detach()
    normal = torch.distributions.Normal(f, 0.7)
    assert mode["nll"] == pytest.approx(float(-normal.log_prob(case.y).sum() / 7))
    assert mode["rmse"] == pytest.approx(float((f - case.y).square().mean().sqrt()))
    inside = (f - case.y).abs() <= 1.6448536 * 0.7
    assert mode["coverage"] == pytest.approx(float(inside.double().mean()))
    assert posterior["coverage"] >= mode["coverage"] and mode["sigma"] == pytest.approx(0.7)
    joint = la.predict(case.x).distribution()
    assert posterior["nll"] == pytest.approx(float(-joint.log_prob(case.y).mean()))


@pytest.mark.parametrize("name", ["mlp-binary", "tokens", "vit"])
def test_other_outputs(name):
    la, case = dense.fit(name)
    for row in la.report(case.batches).rows:
        assert 0 <= row["accuracy"] <= 1 and row["nll"] > 0


@pytest.mark.parametrize("likelihood", ["poisson", "studentt"])
def test_other_likelihoods(likelihood):
    case = build("mlp-regression")
    y = case.y.abs().round() if likelihood == "poisson" else case.y
    la = Laplace(case.model, likelihood).fit([(case.x, y)])
    for row in la.report([(case.x, y)]).rows:
        assert row["nll"] == row["nll"] and "accuracy" not in row


def test_the_table_lines_up_and_the_file_is_the_rows(tmp_path):
    la, case = dense.fit("mlp-tanh")
    report = la.report([(case.x, labels(case))], tmp_path / "report.json")
    lines = str(report).splitlines()
    assert lines[0] == "7 examples" and len({len(line) for line in lines[1:]}) == 1
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"] == report.rows


def test_wrong_loaders():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="no batch"):
        la.report([])
    with pytest.raises(InvalidType, match="loader"):
        la.report(3)
    with pytest.raises(NotFitted):
        Laplace(case.model).report([(case.x, case.y)])


def test_a_line():
    case = build("mlp-tanh")
    la = Laplace(case.model)
    assert repr(la) == "Laplace(Categorical, kron, not fitted)"
    la.fit(case.batches)
    count = sum(p.numel() for p in case.model.parameters())
    assert repr(la) == f"Laplace(Categorical, kron, 7 examples, {count} parameters, κ = 1)"
    la.posterior_scale, la.predictive_temperature = 0.5, 2.0
    assert repr(la).endswith("κ = 0.5, given, τ = 2)")


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("sharing", ["layerwise", "scalar"])
def test_a_table_by_group(structure, sharing):
    la, _ = dense.fit("mlp-tanh", hessian_structure=structure, prior_structure=sharing)
    lines = la.summary().splitlines()
    assert lines[0] == repr(la)
    groups = [line.split() for line in lines if ".weight" in line]
    gammas = [float(cells[-1]) for cells in groups]
    want = float(la.posterior.effective_dimensions().detach().sum())
    assert sum(gammas) == pytest.approx(want, rel=1e-3)
    evidence = next(line for line in lines if line.startswith("log marginal"))
    assert float(evidence.split()[-1]) == pytest.approx(
        float(la.log_marginal_likelihood().detach()), rel=1e-4
    )
    assert any(line.startswith("constant predictor") for line in lines)


def test_a_table_needs_a_fit():
    with pytest.raises(NotFitted):
        Laplace(build("mlp-tanh").model).summary()
