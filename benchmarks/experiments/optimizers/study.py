"""The experiment: its options, its cells and what runs them."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.experiments.choices import names
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.lines import Cell, Lines
from benchmarks.experiments.optimizers.methods import METHODS
from benchmarks.experiments.optimizers.plan import Budget, cells_of
from benchmarks.experiments.optimizers.ranges import drawn
from benchmarks.experiments.optimizers.report import report
from benchmarks.experiments.optimizers.steps import step_costs
from benchmarks.experiments.optimizers.task import Size
from benchmarks.experiments.optimizers.tasks import TASKS
from benchmarks.experiments.optimizers.training import At, Run, trained

NAME = "optimizers"
FIELDS = tuple(field.name for field in fields(Size))


def available() -> list[str]:
    """The methods that can run here."""
    return [name for name, method in METHODS.items() if method.lacks() is None]


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells, and how large."""
    add = parser.add_argument
    add("--tasks", type=names(list(TASKS)), default=list(TASKS), help=f"of {', '.join(TASKS)}")
    add("--methods", type=names(list(METHODS)), default=None,
        help=f"of {', '.join(METHODS)} (default: those whose libraries are installed)")  # fmt: skip
    add("--preset", choices=("cpu", "gpu"), help="size of the tasks (default: by --device)")
    add("--trials", type=int, default=12, help="settings each method tries (default: 12)")
    add("--seeds", type=int, default=5, help="final seeds (default: 5)")
    for name in FIELDS:
        add(f"--{name}", type=int, help="instead of the preset's, for all tasks")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """Costs and searches; what follows from a search once it is finished."""
    methods = chosen.methods or available()
    for name in methods:
        if reason := METHODS[name].lacks():
            raise ValueError(f"{name} cannot run: {reason}")
    preset = chosen.preset or ("gpu" if chosen.device.startswith("cuda") else "cpu")
    given = {name: value for name in FIELDS if (value := getattr(chosen, name)) is not None}
    lines = Lines(chosen.out / f"{NAME}.jsonl").read()
    for task in chosen.tasks:
        size = Size(**(asdict(TASKS[task].sizes[preset]) | given))
        yield from cells_of(task, size, methods, Budget(chosen.trials, chosen.seeds), lines)


@lru_cache(maxsize=1)
def examples(task: str, size: Size, device: str, folder: Path | None) -> At:
    """A task's examples, kept from one cell to the next."""
    return At(device, *TASKS[task].data(size, device, folder))


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train once, or measure steps."""
    name, method = cell["task"], cell["method"]
    task, size = TASKS[name], Size(**{field: cell[field] for field in FIELDS})
    at = examples(name, size, place.device, place.data)
    if cell["phase"] == "cost":
        return step_costs(task, size, method, at)
    settings = drawn(METHODS[method].ranges, cell["trials"])[cell["trial"]]
    wanted = Run(settings, cell["seed"], cell["horizon"], tested=cell["phase"] == "final")
    return trained(task, size, method, wanted, at)


OPTIMIZERS = Experiment(
    name=NAME,
    about="steps and time to a target: K-FAC beside first-order methods, SOAP, Shampoo and ASDL",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
