"""UCI regression: eight sets × splits × methods, a network of 50 GELUs on all rows at once."""

import argparse
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

from benchmarks.experiments.choices import names
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.regression import METHODS, Found, Task
from benchmarks.experiments.statistics import Measure
from benchmarks.experiments.tables import differences, means, summary

#: Smaller ones first.
SETS = (
    "yacht",
    "boston_housing",
    "energy",
    "concrete",
    "wine_quality_red",
    "kin8nm",
    "power_plant",
    "naval_propulsion_plant",
)


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells."""
    add = parser.add_argument
    add("--splits", type=int, default=20, help="how many (default: 20)")
    add("--sets", type=names(SETS), default=list(SETS), help=f"(default: {','.join(SETS)})")
    add("--methods", type=names(list(METHODS)), default=list(METHODS))
    add("--epochs", type=int, default=2500, help="steps on all rows (default: 2500)")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """All cells, a set after another, methods innermost: they share what plain training gave."""
    for name, split, method in product(chosen.sets, range(chosen.splits), chosen.methods):
        yield {"set": name, "split": split, "epochs": chosen.epochs, "method": method}


@lru_cache(maxsize=1)
def task(name: str, split: int, epochs: int, place: Place) -> Task:
    """The last task is kept: its plain network is what the next methods start from."""
    return Task(name, split, epochs, place.device, place.data)


def run(cell: Cell, place: Place) -> Found:
    """Train and predict by one method."""
    return METHODS[cell["method"]](task(cell["set"], cell["split"], cell["epochs"], place))


COLUMNS: dict[str, Measure] = {
    "test log-likelihood": lambda line: -line.found["nll"],
    "of the mode": lambda line: -line.found.get("mode_nll", line.found["nll"]),
    "RMSE": "rmse",
    "coverage of 90 %": "coverage",
    "evidence:.0f": "evidence",
    "σ": "sigma",
    "CPU s:.1f": "seconds",
}


def report(lines: Sequence[Line], folder: Path) -> str:
    """Tables: summary, paired differences and means."""
    group, seed = ("set",), "split"
    parts = {
        "Negative log-likelihood over all sets": summary(
            lines, group, "nll", ("plain", "grid"), seed
        ),
        "Negative log-likelihood − grid, by split": differences(lines, group, "nll", "grid", seed),
        "Negative log-likelihood − plain, by split": differences(
            lines, group, "nll", "plain", seed
        ),
        "By set": means(lines, group, COLUMNS),
    }
    texts = [f"## {title}\n\n{table}" for title, table in parts.items() if table]
    return "# UCI regression\n\n" + "\n".join(texts)


UCI = Experiment(
    name="uci",
    about="UCI regression: plain, grid, posterior afterwards, and tuned",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
