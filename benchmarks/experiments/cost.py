"""What a round of the tuner costs, in epochs of training, by objective; growth in N, C and P."""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.experiments.choices import names
from benchmarks.experiments.clock import Clock
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.networks import VisionTransformer, cnn, mlp, seeded
from benchmarks.experiments.statistics import grouped
from benchmarks.experiments.tables import markdown
from benchmarks.experiments.training import Epochs, Recipe, Rounds, adam
from kfac_laplace import MarglikTuner
from kfac_laplace.demo.data import Split
from kfac_laplace.posterior.objectives.registry import NAMED

#: Where one of N, C and the width is varied, the others are these.
USUAL = {"n": 1000, "classes": 10, "width": 1}
GROWTH: dict[str, tuple[int, ...]] = {
    "n": (100, 300, 1000, 3000),
    "classes": (2, 5, 10, 20),
    "width": (1, 2, 4),
}
#: Exact evidence has n·(c − 1) rows; beyond this many it is left out.
EXACT_ROWS = 2048
KRON = ("reduce", "expand", "reduce-mc")
OBJECTIVES = (*KRON, "columns", "exact", "bounds", "lanczos")
REPEATS = 3


def networks(classes: int, width: int) -> dict[str, Any]:
    """What makes each network, on images of 16 × 16."""

    def headed(model: nn.Module, name: str) -> nn.Module:
        """With as many outputs as there are classes."""
        before = model.get_submodule(name)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Linear(before.in_features, classes))
        return model

    widths = (16 * width, 32 * width, 32 * width)
    return {
        "cnn": lambda: headed(cnn(16, widths=widths), "10"),
        "vit": lambda: headed(VisionTransformer(16, width=32 * width), "head"),
        "mlp": lambda: headed(mlp(16, width=64 * width), "5"),
    }


NETWORKS = tuple(networks(10, 1))


def available() -> list[str]:
    """Objectives that the installed library knows by name."""
    return [name for name in OBJECTIVES if name in KRON or name in NAMED]


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells."""
    add = parser.add_argument
    add("--networks", type=names(NETWORKS), default=list(NETWORKS))
    add("--objectives", type=names(OBJECTIVES), default=available())
    add("--vary", type=names(list(GROWTH)), default=list(GROWTH), help="of n, classes, width")
    add("--largest", type=int, help="no more examples than this")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """Each network and objective at the usual size, and with one of N, C and the width varied."""
    seen = set()
    for varied in chosen.vary:
        for value in GROWTH[varied]:
            size = USUAL | {varied: value}
            if chosen.largest:
                size["n"] = min(size["n"], chosen.largest)
            for network in chosen.networks:
                for objective in chosen.objectives:
                    cell = {"network": network, **size, "objective": objective}
                    rows = size["n"] * (size["classes"] - 1)
                    new = tuple(cell.values()) not in seen
                    if new and not (objective == "exact" and rows > EXACT_ROWS):
                        seen.add(tuple(cell.values()))
                        yield cell


def run(cell: Cell, place: Place) -> dict[str, float]:
    """Seconds of an epoch and of a round by part: medians of three, after one of each."""
    n, classes = cell["n"], cell["classes"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = Split(torch.rand(n, 1, 16, 16), torch.randint(classes, (n,)))
    data = Split(data.x.to(place.device), data.y.to(place.device))
    model = seeded(networks(classes, cell["width"])[cell["network"]], 0, place.device)
    objective, approx = cell["objective"], {}
    if objective in KRON:
        setting, _, fisher = objective.partition("-")
        objective, approx = "kron", {"kfac_approx": setting, "fisher": fisher or "exact"}
    tuner = MarglikTuner(
        model, "classification", n, objective=objective, n_epochs_burnin=0, **approx
    )
    recipe = Recipe(1, adam(1e-3), None, 0)
    optimizer, epochs = recipe.optimizer(model, 0.0), Epochs(data, recipe)
    found: dict[str, list[float]] = {"epoch": [], "round": [], "curvature": []}
    for repeat in range(1, REPEATS + 2):
        clock = Clock(place.device)
        for x, y in epochs.batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found["epoch"].append(clock()[kind(place)])
        clock = Clock(place.device)
        record = tuner.step(Rounds(data), epoch=repeat)
        assert record is not None
        found["round"].append(clock()[kind(place)])
        found["curvature"].append(record.curvature_seconds / record.seconds * found["round"][-1])
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {f"{name}_seconds": value for name, value in medians.items()} | {
        "epochs": medians["round"] / medians["epoch"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def kind(place: Place) -> str:
    """Processor time says more on a shared machine; on an accelerator the clock does."""
    return "seconds" if place.device == "cpu" else "wall_seconds"


def report(lines: Sequence[Line], folder: Path) -> str:
    """A round in epochs: a row for each network and size, a column for each objective."""
    found = dict.fromkeys(str(line.cell["objective"]) for line in lines)
    rows = []
    names = ("network", "n", "classes", "width")
    for group, those in grouped(lines, names).items():
        by = {line.cell["objective"]: line.found for line in those}
        parameters = next(iter(by.values()))["parameters"]
        texts = [
            f"{by[name]['epochs']:.1f} ({by[name]['round_seconds']:.2f})" if name in by else "–"
            for name in found
        ]
        rows.append([*map(str, group), str(parameters), *texts])
    table = markdown([*names, "parameters", *found], rows)
    return f"# A round in epochs (and in seconds)\n\n{table}"


COST = Experiment(
    name="cost",
    about="seconds of a round in epochs, by objective, and growth in N, C and P",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
