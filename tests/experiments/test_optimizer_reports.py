"""What the benchmark of optimisers plans and computes, on lines whose answer is known."""

from __future__ import annotations

from math import inf

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from benchmarks.experiments.experiment import Experiment, Place, run_all
from benchmarks.experiments.lines import Line, Lines
from benchmarks.experiments.optimizers.plan import HORIZONS, Budget, cells_of
from benchmarks.experiments.optimizers.reached import (
    Arrival,
    arrival,
    first,
    horizon_on_first_seed,
    target_of,
)
from benchmarks.experiments.optimizers.report import costs, parts
from benchmarks.experiments.optimizers.task import Size

SIZE = Size(100, 10, 10, 50, 20, 8, 1, 8)
BUDGET = Budget(trials=3, seeds=2)


def planned(methods, lines):
    return list(cells_of("gpt", SIZE, methods, BUDGET, lines))


def finished(cell, score, device="cpu"):
    """A cell whose accuracy rises evenly from 0 to its score in ten evaluations of ten steps."""
    values = [score * place / 10 for place in range(1, 11)] if score is not None else []
    places = range(10, 10 * len(values) + 1, 10)
    steps = [round(step * cell.get("horizon", 1.0)) for step in places]
    curve = {
        "step": steps,
        "seconds": [0.1 * step for step in steps],
        "wall_seconds": [0.2 * step for step in steps],
        "accuracy": values,
        "nll": [1 - value for value in values],
    }
    found = {"curve": curve, "score": score, "diverged": score is None, "device": device}
    return Line(cell, {**found, "settings": {"lr": 0.01, "decay": "linear"}})


def final(method, seed, score, horizon=1.0):
    cell = {"method": method, "seed": seed, "horizon": horizon, "phase": "final", "trials": 3}
    return finished(cell, score)


# --- the plan ------------------------------------------------------------------------------------


def test_finals_wait_for_a_whole_search():
    cells = planned(["sgd", "soap"], [])
    assert [cell["phase"] for cell in cells] == ["cost"] * 2 + ["search"] * 6
    search = [c for c in cells if c["phase"] == "search" and c["method"] == "soap"]
    scores = [0.3, 0.9, None]
    lines = [finished(cell, score) for cell, score in zip(search, scores, strict=True)]
    assert planned(["sgd", "soap"], lines[:2]) == cells
    after = planned(["sgd", "soap"], lines)
    assert after[:8] == cells
    assert {cell["method"] for cell in after[8:]} == {"soap"}
    assert {cell["trial"] for cell in after[8:]} == {1}  # the best of them
    schedule = [cell for cell in after if cell["phase"] == "schedule"]
    assert [(cell["seed"], cell["horizon"]) for cell in schedule] == [(0, h) for h in HORIZONS[1:]]
    finals = [cell for cell in after if cell["phase"] == "final"]
    assert [(cell["seed"], cell["horizon"]) for cell in finals] == [
        (seed, horizon) for seed in (1, 2) for horizon in HORIZONS
    ]


def test_a_method_all_of_whose_trials_diverged_has_no_finals():
    cells = planned(["sgd"], [])
    lines = [finished(cell, None) for cell in cells if cell["phase"] == "search"]
    assert planned(["sgd"], lines) == cells


def test_cells_that_follow_are_run_in_the_same_command(tmp_path):
    lines, ran = Lines(tmp_path / "a.jsonl"), []

    def cells():
        known = [line.found["value"] for line in lines.read()]
        return [{"number": k} for k in range(min(3, 1 + len(known)))] + [{"number": 9}]

    def run(cell, place):
        ran.append(cell["number"])
        if cell["number"] == 9:
            raise RuntimeError("fails, and is not tried again by the same command")
        return {"value": cell["number"]}

    experiment = Experiment("e", "", lambda _: None, lambda _: [], run, lambda _, __: "")
    assert run_all(experiment, cells, lines, Place("cpu", None)) == [{"number": 9}]
    assert ran == [0, 9, 1, 2]


# --- the target ----------------------------------------------------------------------------------


def test_the_target_is_the_lowest_final_of_the_best_first_order_method():
    finals = [final("sgd", 1, 0.9), final("sgd", 2, 0.5)]  # the best single one, not the best mean
    finals += [final("adamw", 1, 0.8), final("adamw", 2, 0.7), final("adamw", 1, 0.99, horizon=0.5)]
    finals += [final("soap", 1, 0.95), final("soap", 2, 0.95)]
    assert target_of(finals, ["sgd", "adamw"]) == ("adamw", 0.7)
    finals.append(final("adamw", 3, None))
    assert target_of(finals, ["sgd", "adamw"]) == ("sgd", 0.5)  # a seed of the other diverged
    assert target_of(finals, ["nadamw"]) is None


def test_the_first_evaluation_at_the_target_counts():
    line = final("sgd", 1, 0.8)  # 0.08 at step 10, 0.16 at step 20
    assert first(line, "accuracy", 0.15) == (20, pytest.approx(2.0))
    assert first(line, "accuracy", 0.8) == (100, pytest.approx(10.0))
    assert first(line, "accuracy", 0.81) == (inf, inf)
    assert first(line, "nll", -0.84) == (20, pytest.approx(2.0))  # 1 − 0.16
    on_device = finished(dict(line.cell), 0.8, device="cuda")
    assert first(on_device, "accuracy", 0.15) == (20, pytest.approx(4.0))  # the clock's


def test_medians_over_seeds_count_those_that_never_arrive():
    lines = [final("sgd", seed, score) for seed, score in enumerate((0.8, 0.4, 0.3))]
    found = arrival(lines, "accuracy", 0.4)  # at steps 50, 100 and never
    assert found == Arrival(100, pytest.approx(10.0), reached=2, count=3)
    assert arrival(lines, "accuracy", 0.5).steps == inf
    assert arrival([], "accuracy", 0.5) is None


def test_the_horizon_with_the_fewest_steps_on_the_first_seed():
    cell = {"method": "soap", "seed": 0, "horizon": 1.0, "phase": "search"}
    best = {"soap": finished(cell, 0.8)}
    schedule = [
        finished({**cell, "phase": "schedule", "horizon": horizon}, score)
        for horizon, score in ((0.7, 0.8), (0.5, 0.7), (0.3, 0.5))
    ]
    chosen = [
        horizon_on_first_seed(schedule, "soap", best, "accuracy", goal)
        for goal in (0.8, 0.7, 0.5, 0.9)
    ]
    # 0.7 at 70 steps; 0.5 at 50; 0.3 at 30; none, so the full one
    assert chosen == [0.7, 0.5, 0.3, 1.0]


# --- the report ----------------------------------------------------------------------------------


def whole():
    """Two methods: soap is as good in half of the steps at every horizon."""
    lines = []
    for method in ("sgd", "soap"):
        base = {"task": "graphs", "method": method, "trials": 3}
        for trial, score in enumerate((0.2, 0.8, 0.4)):
            cell = {**base, "phase": "search", "trial": trial, "seed": 0, "horizon": 1.0}
            lines.append(finished(cell, score))
        for horizon in HORIZONS[1:]:
            score = 0.8 if method == "soap" and horizon >= 0.5 else 0.6
            cell = {**base, "phase": "schedule", "trial": 1, "seed": 0, "horizon": horizon}
            lines.append(finished(cell, score))
        for seed in (1, 2):
            for horizon in HORIZONS:
                score = 0.8 if horizon == 1 or (method == "soap" and horizon >= 0.5) else 0.6
                cell = {**base, "phase": "final", "trial": 1, "seed": seed, "horizon": horizon}
                lines.append(finished(cell, score))
    return lines


def test_the_table_of_steps_to_the_target():
    searches, target, table, horizons, cost = parts("graphs", whole())
    assert "| soap | 3 of 3 | 0.8000 | 0.4000 | 0 | lr 0.01, decay linear |" in searches
    assert target == "Target: accuracy 0.8000, the lowest of sgd's final seeds.\n"
    assert "| sgd | 1 | 2 of 2 | 100 | 10.00 | 1.00 | 1.00 | 0.8000 ± 0.0000 |" in table
    assert "| soap | 0.5 | 2 of 2 | 50 | 5.00 | 0.50 | 0.50 | 0.8000 ± 0.0000 |" in table
    row = "| soap | 100, 10.00 s (2) | 70, 7.00 s (2) | 50, 5.00 s (2) | – (0) |"
    assert row in horizons
    assert cost == ""


def test_another_budget_of_trials_is_not_mixed_in():
    lines = whole()
    other = [Line({**line.cell, "trials": 2}, line.found) for line in lines]
    assert list(parts("graphs", other + lines)) == list(parts("graphs", lines))


def test_the_table_of_costs():
    found = {"cycle": [0.002, 0.004], "ratio": 1.5, "largest": 2.0, "state": 7.25}
    line = Line({"method": "soap", "phase": "cost"}, {**found, "parameters": 80})
    other = Line({"method": "asdl", "phase": "cost"}, {**line.found, "state": None})
    table = costs([line, other])
    assert "| soap | 3.00 | 1.50 | 2.00 | 7.2 | 80 |" in table
    assert "| asdl | 3.00 | 1.50 | 2.00 | – | 80 |" in table
