"""What a report says and writes, and data that are odd."""

import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from cases import build
from posterior import dense
from report.some_reports import made

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue, MissingPackage
from kfac_laplace.report import Report
from kfac_laplace.report.ranks import Told
from kfac_laplace.report.tables import Row
from kfac_laplace.summary import rows_of_html


def strict(text):
    """JSON as the standard has it, without NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", ["classes", "values", "alone"])
def test_json(name, tmp_path):
    report = made(name)
    report.save(tmp_path / "report.json")
    found = strict((tmp_path / "report.json").read_text("utf-8"))
    assert found == strict(json.dumps(report.to_dict()))
    assert found["rows"] == report.rows and found["n"] == report.n
    assert [layer["name"] for layer in found["layers"]] == ["0.weight", "2.weight"]


def test_numbers_that_are_none_are_null():
    report = Report([Row("mode", {"nll": math.inf, "rmse": 1.0})])
    assert report.to_dict()["rows"] == [{"prediction": "mode", "nll": None, "rmse": 1.0}]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "html", "PNG"])
def test_files_are_what_their_suffix_says(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml", "html": b"<!doctype html>"}
    path = tmp_path / f"report.{suffix}"
    made("alone").save(path)
    assert path.read_bytes().startswith(starts[suffix.lower()])


def test_a_wrong_suffix_is_told_before_anything_is_predicted(tmp_path):
    la, case = dense.fit("mlp-tanh")

    def batches():
        raise AssertionError("read")
        yield

    with pytest.raises(InvalidValue, match="suffix"):
        la.report(batches(), tmp_path / "report.docx")


def test_a_figure_leaves_pyplot_and_its_settings_alone():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    before, shown = dict(matplotlib.rcParams), pyplot.get_fignums()
    figure = made("classes").figure()
    assert [ax.get_title() for ax in figure.axes if ax.get_title()][:2] == [
        "Reliability",
        "Risk and coverage",
    ]
    assert pyplot.get_fignums() == shown and dict(matplotlib.rcParams) == before


def test_the_page_is_the_same_each_time():
    pytest.importorskip("matplotlib")
    assert made("alone").html() == made("alone").html()


def test_reports_can_be_pickled():
    report = made("classes")
    assert str(pickle.loads(pickle.dumps(report))) == str(report)


@pytest.mark.slow
def test_numbers_need_no_picture_package():
    """Importing and measuring load neither matplotlib nor torchmetrics."""
    code = """
import sys, torch
from kfac_laplace import Laplace
torch.manual_seed(0)
x, y = torch.randn(9, 2), torch.arange(9) % 3
la = Laplace(torch.nn.Linear(2, 3)).fit([(x, y)])
str(la.report([(x, y)], ood_loader=[3 * x])), la._repr_html_(), la.summary()
assert not {"matplotlib", "torchmetrics", "sklearn"} & set(sys.modules)
sys.modules["matplotlib"] = None  # as if it were not installed
from kfac_laplace.errors import MissingPackage
try:
    la.report([(x, y)]).html()
except MissingPackage as error:
    assert "report]" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(MissingPackage, ImportError)


# --- tables --------------------------------------------------------------------------------------


def test_intervals_are_around_values_and_differences_are_to_the_mode():
    report = made("classes")
    for row, intervals in zip(report.rows, report.intervals, strict=True):
        for name, (low, high) in intervals.items():
            assert low <= row[name] <= high or name in ("aurc", "fpr95", "auroc")
    mode = report.rows[0]
    assert report.differences[0] == {}
    for row, differences in zip(report.rows[1:], report.differences[1:], strict=True):
        for name, (value, _, _) in differences.items():
            assert value == pytest.approx(row[name] - mode[name], abs=1e-12)


def test_the_same_seed_gives_the_same_report():
    assert made("values").to_dict() == made.__wrapped__("values").to_dict()


def test_strange_inputs_by_every_score():
    la, case = dense.fit("mlp-tanh")
    strange = 5 * case.x
    report = la.report(case.batches, ood_loader=[strange[:3], strange[3:]])
    found = {row["score"].split(",")[0]: row for row in report.ood if "auto" in row["score"]}
    names = {"ood_score": "last_layer", "mutual information": "epistemic", "variance": "variance"}
    for told, name in {**names, "entropy": "entropy"}.items():
        usual, others = (la.predict(x).score(name) for x in (case.x, strange))
        ones = torch.ones(1, 7).double()
        want = Told(usual, others).figures(ones, ones)
        assert found[told]["auroc"] == pytest.approx(float(want["auroc"]))
        assert found[told]["fpr95"] == pytest.approx(float(want["fpr95"]))


def test_tables_of_notebooks_are_escaped_and_short():
    la = Laplace(build("mlp-tanh").model)
    assert la._repr_html_() == f"<div><strong>{la!r}</strong></div>"
    assert made("classes")._repr_html_().count("<table>") == 2
    assert "&lt;" in rows_of_html([["<b>", "&"]]) and "<b>" not in rows_of_html([["<b>", "&"]])


def test_many_groups_are_cut_short_in_notebooks_and_not_in_the_summary():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2, 2, bias=False).double() for _ in range(30)]
    la = Laplace(torch.nn.Sequential(*layers))
    la.fit([(torch.randn(5, 2).double(), torch.arange(5) % 2)])
    assert "… 10 more" in la._repr_html_() and "<td>30</td>" not in la._repr_html_()
    assert sum(".weight" in row for row in la.summary().splitlines()) == 30


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_summary_tells_treatment_and_memory(structure):
    la, case = dense.fit("frozen-bias", hessian_structure=structure)
    rows = {row.split()[0]: row for row in la.summary().splitlines() if row.strip()}
    assert "frozen" in rows["0.bias"] and "layer rule" in rows["0.weight"]
    blocks = la.curvature.blocks.values()
    stored = sum(t.numel() * t.element_size() for one in blocks for t in one.tensors().values())
    said = la.summary().split("in the posterior")[1].splitlines()[0].split()
    size = float(said[1]) * {"B": 1, "KiB": 1024}[said[2]]
    assert size == pytest.approx(stored, rel=0.05)


def test_the_summary_tells_copies_by_example():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.mixed = torch.nn.Parameter(torch.randn(4, 3).double())

        def forward(self, x):
            return torch.cdist(x, self.mixed.mT)

    case = build("mlp-tanh")
    la = Laplace(Scaled()).fit(case.batches)
    row = next(row for row in la.summary().splitlines() if row.startswith("mixed"))
    assert "copies by example" in row and "diag" in row


# --- odd data ------------------------------------------------------------------------------------


def test_one_example():
    report = made("alone")
    assert report.n == 1 and not any(report.intervals) and not any(report.differences)
    assert "1 examples" in str(report) and "resamples" not in str(report)


def test_one_class():
    la, case = dense.fit("mlp-tanh")
    report = la.report([(case.x, torch.zeros(7, dtype=torch.long))], ood_loader=[5 * case.x])
    want = (case.model(case.x).argmax(1) == 0).double().mean()
    assert report.rows[0]["accuracy"] == pytest.approx(float(want))


@pytest.mark.parametrize("where", ["loader", "ood_loader"])
def test_inputs_that_are_not_numbers(where):
    la, case = dense.fit("mlp-tanh")
    wrong = torch.full_like(case.x, math.nan)
    data = {"loader": [(case.x, case.y)], "ood_loader": [case.x]}
    data[where] = [(wrong, case.y)]
    with pytest.raises(InvalidValue, match="not finite"):
        la.report(**data)


def test_tokens_without_labels():
    """Positions of −100 are not there; a whole example of them counts nowhere."""
    la, case = dense.fit("tokens")
    y = case.y.clone()
    y[0], y[1, 2:], y[-1] = -100, -100, -100
    report = la.report([(case.x, y)], resamples=200)
    f = case.model(case.x).detach()
    kept = y != -100
    want = torch.nn.functional.cross_entropy(f[kept], y[kept])
    assert report.rows[0]["nll"] == pytest.approx(float(want))
    want = (f.argmax(-1) == y)[kept].double().mean()
    assert report.rows[0]["accuracy"] == pytest.approx(float(want))
    low, high = report.intervals[0]["nll"]
    assert low < report.rows[0]["nll"] < high


def test_mapping_batches():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 3).double()

        def forward(self, pixels):
            return self.layer(pixels)

    case = build("mlp-tanh")
    batches = [{"pixels": x, "labels": y} for x, y in case.batches]
    la = Laplace(Named()).fit(batches)
    got = la.report(batches, ood_loader=[{"pixels": 5 * case.x}])
    plain = Laplace(Named()).fit(case.batches).report(case.batches, ood_loader=[5 * case.x])
    assert got.rows == plain.rows and got.intervals == plain.intervals


@pytest.mark.parametrize("likelihood", ["poisson", "studentt", "heteroscedastic"])
def test_values_without_gaussian_noise(likelihood):
    case = build("mlp-regression")
    y = case.y.abs().round() if likelihood == "poisson" else case.y
    y = y[:, :1] if likelihood == "heteroscedastic" else y
    la = Laplace(case.model, likelihood, prior_precision=10.0).fit([(case.x, y)])
    for row in la.report([(case.x, y)], ood_loader=[2 * case.x]).rows:
        assert row["crps"] > 0 and row["rmse"] > 0 and row["sharpness"] > 0
        assert 0 <= row["coverage_50"] <= row["coverage_90"] <= row["coverage_95"] <= 1


def test_batches_do_not_matter():
    la, case = dense.fit("mlp-tanh")
    one = la.report([(case.x, case.y)], ood_loader=[5 * case.x])
    many = la.report(case.batches, ood_loader=[5 * case.x[:2], 5 * case.x[2:]])
    for a, b in zip(one.rows, many.rows, strict=True):
        assert {k: v for k, v in a.items() if k != "prediction"} == pytest.approx(
            {k: v for k, v in b.items() if k != "prediction"}
        )
