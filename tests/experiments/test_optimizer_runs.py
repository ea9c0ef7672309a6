"""Runs of the benchmark of optimisers."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

import torch
from experiments.made_up import write_cifar, write_mnist
from experiments.tiny_tasks import TINY, can_run, tiny

from benchmarks.experiments.experiment import Place
from benchmarks.experiments.lines import Lines
from benchmarks.experiments.optimizers import text
from benchmarks.experiments.optimizers.methods import METHODS
from benchmarks.experiments.optimizers.ranges import middle
from benchmarks.experiments.optimizers.study import OPTIMIZERS
from benchmarks.experiments.optimizers.tasks import TASKS
from benchmarks.experiments.optimizers.training import At, Run, trained

# --- runs ----------------------------------------------------------------------------------------


def cell_of(task, method, **entries):
    size = tiny(task).__dict__
    common = {"trials": 3, "trial": 0, "seed": 0, "horizon": 1.0, "phase": "search"}
    return {"task": task, **size, "method": method, **common, **entries}


@pytest.mark.parametrize("method", [can_run(name) for name in METHODS])
def test_runs_come_out_the_same_again(method, tmp_path):
    write_mnist(tmp_path)
    state = torch.get_rng_state()
    curves = [
        OPTIMIZERS.run(cell_of("mnist-vit", method), Place("cpu", tmp_path))["curve"]
        for _ in range(2)
    ]
    assert curves[0]["step"] == [2, 4]
    assert curves[0]["nll"] == curves[1]["nll"]
    assert torch.equal(state, torch.get_rng_state())
    for kind in ("seconds", "wall_seconds"):
        assert 0 < curves[0][kind][0] < curves[0][kind][1]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(task, tmp_path):
    write_mnist(tmp_path)
    write_cifar(tmp_path)
    for method in ("adamw", "soap"):
        found = OPTIMIZERS.run(cell_of(task, method), Place("cpu", tmp_path))
        assert not found["diverged"] and math.isfinite(found["score"])
        last = found["curve"][TASKS[task].measure][-1]
        assert found["score"] == (last if TASKS[task].measure == "accuracy" else -last)


def test_finals_are_of_test_examples_and_shorter_at_a_horizon():
    place = Place("cpu", None)
    whole, short, final = (
        OPTIMIZERS.run(cell_of("gpt", "adamw", **entries), place)["curve"]
        for entries in ({}, {"horizon": 0.5}, {"phase": "final"})
    )
    assert short["step"] == [2]
    assert short["nll"][0] != whole["nll"][0] != final["nll"][0]  # other rates; other examples


def test_a_run_that_diverges_says_so():
    settings = middle(METHODS["sgd"].ranges) | {"lr": 1e30}
    at = At("cpu", *text.data(tiny("gpt"), "cpu"))
    found = trained(TASKS["gpt"], tiny("gpt"), "sgd", Run(settings, 0, 1.0, tested=False), at)
    assert found["diverged"] and found["score"] is None
    assert found["curve"]["step"] in ([], [2])  # and is not gone on with


def test_costs_of_a_step():
    found = OPTIMIZERS.run(cell_of("gpt", "soap", phase="cost"), Place("cpu", None))
    assert len(found["cycle"]) == len(found["baseline"]) == 10
    mean = sum(found["cycle"]) / sum(found["baseline"])
    assert found["ratio"] == pytest.approx(mean) and found["largest"] >= found["ratio"]
    assert found["parameters"] == sum(
        p.numel() for p in TASKS["gpt"].network(tiny("gpt")).parameters()
    )


@pytest.mark.slow
def test_the_command_runs_what_follows_and_nothing_twice(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.experiments.__main__ import main

    sizes = " ".join(f"--{k} {v}" for k, v in TINY.__dict__.items())
    command = f"optimizers --tasks gpt --methods sgd,soap --trials 2 --seeds 2 {sizes}"
    arguments = [*command.split(), "--out", str(tmp_path)]
    assert main(arguments) == 0
    lines = Lines(tmp_path / "optimizers.jsonl").read()
    counts = {}
    for line in lines:
        counts[line.cell["phase"]] = counts.get(line.cell["phase"], 0) + 1
    # two methods: a cost, two trials, three more horizons, two seeds of four
    assert counts == {"cost": 2, "search": 4, "schedule": 6, "final": 16}
    finals = [line for line in lines if line.cell["phase"] == "final"]
    assert {line.cell["seed"] for line in finals} == {1, 2}
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert main(["tables", "--out", str(tmp_path)]) == 0
    assert "Target: nll" in capsys.readouterr().out
    for axis in ("steps", "seconds"):
        assert (tmp_path / f"optimizers-gpt-0-{axis}.png").stat().st_size > 0
