"""Missing cells are run, finished ones are not, failed ones again."""

from __future__ import annotations

import logging

import pytest

from benchmarks.experiments.data import MissingData
from benchmarks.experiments.experiment import Experiment, Place, chosen, run_missing
from benchmarks.experiments.lines import Lines

CELLS = [{"network": name, "seed": seed} for name in ("cnn", "mlp") for seed in range(2)]


def experiment(run):
    return Experiment("e", "", lambda _: None, lambda _: CELLS, run, lambda lines, folder: "")


def test_a_run_goes_on_where_it_was_killed(tmp_path):
    lines, ran = Lines(tmp_path / "a.jsonl"), []

    def run(cell, place):
        ran.append((cell["network"], cell["seed"]))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return {"nll": cell["seed"]}

    with pytest.raises(KeyboardInterrupt):
        run_missing(experiment(run), CELLS, lines, Place("cpu", None))
    with lines.path.open("ab") as file:
        file.write(b'{"cell": {"network"')  # and in the middle of a line
    assert run_missing(experiment(run), CELLS, lines, Place("cpu", None)) == []
    assert ran == [("cnn", 0), ("cnn", 1), ("mlp", 0), ("mlp", 0), ("mlp", 1)]
    assert [line.cell for line in lines.read()] == CELLS


def test_failed_cells_are_named_and_tried_again(tmp_path, capsys):
    lines, broken = Lines(tmp_path / "a.jsonl"), [True]

    def run(cell, place):
        if broken[0] and cell["network"] == "cnn":
            raise RuntimeError("no such thing")
        return {}

    assert run_missing(experiment(run), CELLS, lines, Place("cpu", None)) == CELLS[:2]
    assert "no such thing" in capsys.readouterr().err
    broken[0] = False
    assert run_missing(experiment(run), CELLS, lines, Place("cpu", None)) == []
    assert len(lines.read()) == 4


def test_warnings_of_the_library_are_kept(tmp_path, caplog):
    def run(cell, place):
        for text in ("do not trust it", "do not trust it", "nor this"):
            logging.getLogger("kfac_laplace").warning("seed %d: " + text, cell["seed"])
        return {"nll": 1.0} if cell["seed"] else {}

    lines = Lines(tmp_path / "a.jsonl")
    run_missing(experiment(run), CELLS[1:2], lines, Place("cpu", None))
    warnings = ["seed 1: do not trust it", "seed 1: nor this"]
    assert [line.found for line in lines.read()] == [{"nll": 1.0, "warnings": warnings}]
    assert caplog.records == []


def test_missing_data_stop_the_run(tmp_path):
    def run(cell, place):
        raise MissingData("mnist.npz")

    with pytest.raises(MissingData):
        run_missing(experiment(run), CELLS, Lines(tmp_path / "a.jsonl"), Place("cpu", None))


def test_only_takes_some_cells():
    assert chosen(CELLS, {}) == CELLS
    assert chosen(CELLS, {"network": ["mlp"], "seed": ["1", "0"]}) == CELLS[2:]
    with pytest.raises(ValueError, match="no cell with vit; there are cnn, mlp"):
        chosen(CELLS, {"network": ["vit"]})
    with pytest.raises(ValueError, match="none that have it"):
        chosen(CELLS, {"colour": ["red"]})
