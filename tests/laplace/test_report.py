"""`report`, `summary` and `repr`: numbers by other means, and tables that line up."""

import json
from dataclasses import replace

import pytest
import torch
from cases import build
from posterior import dense
from torch.utils.data import DataLoader, IterableDataset

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.report.ranks import Told


def auroc(usual, strange):
    ones = torch.ones(1, len(usual)).double(), torch.ones(1, len(strange)).double()
    return float(Told(usual, strange).figures(*ones)["auroc"])


def labels(case):
    y = case.model(case.x).detach().argmax(1)
    return torch.cat([y[:4], (y[4:] + 1) % 3])


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
    assert mode["coverage_90"] == pytest.approx(float(inside.double().mean()))
    assert posterior["coverage_90"] >= mode["coverage_90"] and mode["sigma"] == pytest.approx(0.7)
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
    values, intervals = lines[1:5], lines[7:11]
    assert lines[0] == "7 examples" and len({len(line) for line in values}) == 1
    assert len({len(line) for line in intervals}) == 1
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["rows"] == report.rows


def test_wrong_loaders():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="no batch"):
        la.report([])
    with pytest.raises(InvalidType, match="loader"):
        la.report(3)
    with pytest.raises(NotFitted):
        Laplace(case.model).report([(case.x, case.y)])


class Streamed(IterableDataset):
    """Examples of which nothing tells how many they are."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def test_held_out_data_without_a_length():
    la, case = dense.fit("mlp-tanh")
    batch = case.x, labels(case)
    streamed = DataLoader(Streamed(*batch), batch_size=7)
    got = la.report([batch], val_loader=streamed, ood_loader=DataLoader(2 * case.x, batch_size=4))
    want = la.report([batch], val_loader=[batch], ood_loader=[2 * case.x])
    assert [row["prediction"] for row in got.rows] == [row["prediction"] for row in want.rows]
    for one, other in zip(got.rows, want.rows, strict=True):
        numbers = [{k: v for k, v in r.items() if k != "prediction"} for r in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


@pytest.mark.parametrize("name", ["val_loader", "ood_loader"])
def test_loaders_beside_the_data_hold_something(name):
    la, case = dense.fit("mlp-tanh")
    batch = case.x, labels(case)
    la.calibrate([batch], "validation")  # what no loader at all would fall back to
    with pytest.raises(InvalidValue, match=f"no batch.*{name}|{name}.*no batch"):
        la.report([batch], **{name: []})
    with pytest.raises(InvalidType, match=name):
        la.report([batch], **{name: 3})


FORMS = {
    "inputs": lambda x, y: x,
    "alone in a list": lambda x, y: [x],
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "nothing": lambda x, y: (x, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_strange_inputs(form):
    la, case = dense.fit("mlp-tanh")
    batch, strange = (case.x, labels(case)), 10 * case.x
    want = la.report([batch], ood_loader=[strange]).rows
    assert la.report([batch], ood_loader=[FORMS[form](strange, case.y)]).rows == want


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 3).double()

    def forward(self, pixels):
        return self.layer(pixels)


def test_mappings_of_strange_inputs():
    case = build("mlp-tanh")
    test = [{"pixels": case.x, "labels": case.y}]
    la = Laplace(Named()).fit(test)
    strange = {"pixels": 10 * case.x}
    with_targets, without = (
        la.report(test, ood_loader=[each]).rows for each in ({**strange, "labels": case.y}, strange)
    )
    assert with_targets == without
    want = auroc(la.predict(test[0]).ood_score, la.predict(strange).ood_score)
    assert with_targets[-2]["auroc"] == pytest.approx(want)


def test_strange_inputs_by_batch_fn():
    """Its x, wherever that is: here it comes last of three."""
    case = build("mlp-tanh")
    plain = Laplace(case.model).fit(case.batches)
    la = Laplace(case.model, batch_fn=lambda raw: (raw[2], raw[0]))
    la.fit([(y, "name", x) for x, y in case.batches])
    y, strange = labels(case), 10 * case.x
    got = la.report([(y, "name", case.x)], ood_loader=[(y, "name", strange)])
    assert got.rows == plain.report([(case.x, y)], ood_loader=[strange]).rows
    with pytest.raises(InvalidType, match="ood_loader.*batch_fn|batch_fn.*ood_loader"):
        plain.report([(case.x, y)], ood_loader=[(strange, y, y)])


def test_labels_that_count():
    la, case = dense.fit("mlp-tanh")
    y = labels(case)
    nothing = torch.full_like(y, -100)
    with pytest.raises(InvalidValue, match="no target counts"):
        la.report([(case.x, nothing)])
    some = la.report([(case.x, y), (case.x, nothing)])
    assert some.rows == la.report([(case.x, y)]).rows


def test_a_line_has_all_digits_of_the_examples():
    la, _ = dense.fit("mlp-tanh")
    la.curvature.ggn = replace(la.curvature.ggn, n_data=1_281_167)
    assert "1281167 examples" in repr(la)


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
