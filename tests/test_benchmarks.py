"""The benchmark command: every suite runs, agrees with a peer, and reports failures as rows."""

from __future__ import annotations

import json
import math
import shutil

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.cases import CONTENDERS, SIZES, SUITES, Case, cases, takes_part
from benchmarks.models import NETWORKS, Size, build, draw, freeze_all_but_linear_layers
from benchmarks.rounds import Conditions, run_case, summary


def run(folder, suite, peers):
    """Rows of a suite at the smallest sizes."""
    assert main(["--suite", suite, "--peers", peers, "--sizes", "tiny", "--out", str(folder)]) == 0
    assert (folder / f"{suite}.png").stat().st_size > 0
    return json.loads((folder / f"{suite}.json").read_text())["rows"]


def check_numbers(row):
    assert row["status"] == "ok"
    assert row["ratio"] > 0 and math.isfinite(row["peak_mib"])
    assert row["ratio"] == pytest.approx(row["seconds"] / row["step_seconds"])  # one round


@pytest.mark.slow
def test_fit_agrees_with_a_peer(tmp_path):
    """Traces of the exact GGN blocks agree to single precision, and the page shows it."""
    pytest.importorskip("curvlinops")
    ours, theirs = run(tmp_path, "fit", "ours,curvlinops")
    check_numbers(ours)
    check_numbers(theirs)
    assert theirs["trace"] == pytest.approx(ours["trace"], rel=1e-5)

    page = tmp_path / "page.md"
    shutil.copy(report.PAGE, page)
    assert report.write_page(tmp_path, page) == ["fit"]
    text = page.read_text(encoding="utf-8")
    assert f"| | curvlinops | {1000 * theirs['seconds']:.4g} |" in text
    for suite in SUITES:
        assert text.count(f"<!-- table: {suite} -->") == 1
    assert report.write_page(tmp_path, page) == ["fit"]
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_rows_of_an_earlier_run_are_kept(tmp_path):
    """Each contender's row stays until it is measured again; other conditions do not mix."""
    options = ["--suite", "fit", "--sizes", "tiny", "--out", str(tmp_path), "--keep"]
    run(tmp_path, "fit", "ours")
    path = tmp_path / "fit.json"
    content = json.loads(path.read_text())
    content["rows"].append({**content["rows"][0], "contender": "asdl", "seconds": 123.0})
    path.write_text(json.dumps(content))
    assert main([*options, "--peers", "ours"]) == 0
    ours, theirs = json.loads(path.read_text())["rows"]
    assert (ours["contender"], theirs["contender"], theirs["seconds"]) == ("ours", "asdl", 123.0)
    assert ours["seconds"] != content["rows"][0]["seconds"]
    with pytest.raises(SystemExit, match="other conditions"):
        main([*options, "--peers", "ours", "--threads", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["evidence", "predict", "online"])
def test_suites_run(tmp_path, suite):
    (row,) = run(tmp_path, suite, "ours,ours-laplace")  # one of them has no posterior
    assert row["contender"] == "ours-laplace"
    check_numbers(row)


@pytest.mark.slow
def test_scaling_runs(tmp_path):
    rows = run(tmp_path, "scaling", "ours")
    assert [row["batch"] for row in rows] == [8, 16]
    for row in rows:
        check_numbers(row)


def test_a_time_limit_is_a_row(tmp_path):
    (row,) = run_case(Case("fit", "mlp"), ["ours"], Conditions(timeout=0.1, repeats=3), print)
    assert row["status"] == "not done after 0 s"
    made = report.markdown("fit", [row]).splitlines()[-1]
    assert "| ours | not done after 0 s | – |" in made


@pytest.mark.slow
def test_a_memory_limit_is_a_row():
    """A curvature of 784 × 784 does not fit into half a MiB."""
    (row,) = run_case(Case("fit", "mlp"), ["ours"], Conditions(memory_gib=2**-11), print)
    assert row["status"] == "out of memory"


def test_rounds_end_in_medians():
    rounds = [
        {"status": "ok", "seconds": seconds, "step_seconds": step, "peak_mib": 1.0}
        for seconds, step in ((3.0, 1.0), (1.0, 0.1), (2.0, 1.0))
    ]
    row = summary(rounds)
    assert (row["seconds"], row["ratio"], row["seconds_by_round"]) == (2.0, 3.0, [3.0, 1.0, 2.0])
    assert summary([*rounds, {"status": "failed: no"}]) == {"status": "failed: no"}


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("sizes", SIZES)
def test_cases_are_distinct_and_taken_by_ours(suite, sizes):
    """A table finds a contender's reference by the title of the case."""
    made = cases(suite, sizes)
    assert len({case.title for case in made}) == len({*made}) > 0
    for case in made:
        assert Case.from_plain(json.loads(json.dumps(case.plain()))) == case
        assert any(takes_part(name, case) for name in CONTENDERS if name.startswith("ours"))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network):
    if network == "resnet18":
        pytest.importorskip("torchvision")
    model = build(network, 7, Size())
    x, y = draw(network, 3, 7, Size())
    assert model(x).shape == (3, 7) and y.shape == (3,)
    total = sum(p.numel() for p in model.parameters())
    frozen = freeze_all_but_linear_layers(model)
    assert frozen == total - sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (frozen > 0) == (network in ("resnet18", "vit"))


@pytest.mark.parametrize(
    "arguments", [["--suite", "paint"], ["--peers", "ours,nobody"], ["--repeats", "0"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[1].split(",")[-1] in capsys.readouterr().err
