"""The range of rotations that the evidence chooses on MNIST rotated at random.

Training and test images are rotated by an angle from ±A. The network is mean_k f(R(α u_k) x) with
u_k evenly in [−1, 1]: an MLP on 15 rotated copies of each image, its outputs averaged, which K-FAC
takes as a layer with a shared axis (reduce). It is trained with the default tuner for each α of a
grid. The learned range is where a parabola through the largest evidence of the grid and its two
neighbours has its top; evidences are those of training images alone.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments import settings
from benchmarks.experiments.augmentation import moved
from benchmarks.experiments.choices import numbers
from benchmarks.experiments.data import images
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.figures import curves
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.networks import CLASSES, seeded
from benchmarks.experiments.statistics import estimate, grouped, mean_of
from benchmarks.experiments.tables import markdown
from benchmarks.experiments.training import Recipe, Rounds, adam, train
from kfac_laplace import MarglikTuner
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.metrics import accuracy, nll

COPIES, WIDTH, LEARNING_RATE = 15, 64, 3e-3
TRUE = (30, 60, 90, 120)
GRID = (15, 30, 45, 60, 75, 90, 105, 120, 135, 150, 165)


class Averaged(nn.Module):
    """An MLP whose outputs are averaged over copies (n, k, 256) of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(256, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Copies (n, k, 256) to logits (n, classes)."""
        return self.layers(x).mean(1)


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells."""
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="how many (default: 3)")
    add("--true", type=numbers, default=list(TRUE), metavar="N,N", help="A, in degrees")
    add("--grid", type=numbers, default=list(GRID), metavar="N,N", help="α, in degrees")
    add("--size", type=int, default=1000, help="training images (default: 1000)")
    add("--epochs", type=int, default=60, help="(default: 60)")
    add("--test-images", type=int, default=2000, help="at most (default: 2,000)")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """Seeds × A × α."""
    for seed, true, alpha in product(range(chosen.seeds), chosen.true, chosen.grid):
        yield {
            "true": true,
            "alpha": alpha,
            "size": chosen.size,
            "seed": seed,
            "epochs": chosen.epochs,
            "test": chosen.test_images,
        }


@lru_cache(maxsize=1)
def rotated(size: int, test: int, seed: int, true: float, folder: Path | None) -> list[Split]:
    """Training and test images, each rotated by an angle from ±A."""
    generator = torch.Generator().manual_seed(seed)
    found = images("mnist", size, seed, (test, 1), folder)
    return [
        Split(turned(part.x, true * (2 * torch.rand(len(part.y), generator=generator) - 1)), part.y)
        for part in found[:2]
    ]


def turned(x: Tensor, degrees: Tensor) -> Tensor:
    """Each image turned by its angle (n,)."""
    still = torch.zeros(len(x))
    return moved(x, degrees * math.pi / 180, still, still)


def copies(x: Tensor, alpha: float) -> Tensor:
    """Copies (n, k, 256) of images, turned by angles that lie evenly in ±α."""
    angles = torch.linspace(-alpha, alpha, COPIES)
    return torch.stack([turned(x, angle.expand(len(x))).flatten(1) for angle in angles], 1)


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train at one α with the default tuner."""
    seed, size = cell["seed"], cell["size"]
    parts = rotated(size, cell["test"], seed, cell["true"], place.data)
    training, test = (
        Split(copies(part.x, cell["alpha"]).to(place.device), part.y.to(place.device))
        for part in parts
    )
    model = seeded(Averaged, seed, place.device)
    tuner = MarglikTuner(model, "classification", size, marglik_frequency=settings.FREQUENCY)
    fit = train(
        model, training, Recipe(cell["epochs"], adam(LEARNING_RATE), None, seed), tuner=tuner
    )
    la = tuner.laplace(Rounds(training))
    with torch.no_grad():
        probs = model(test.x).softmax(-1).cpu()
    labels = test.y.cpu()
    return fit.costs | {
        "evidence": float(la.log_marginal_likelihood()),
        "evidence_columns": float(la.evidence("columns").value),
        "nll": nll(probs, labels),
        "accuracy": accuracy(probs, labels),
    }


# --- the report ----------------------------------------------------------------------------------


def top(points: Sequence[tuple[float, float]]) -> float:
    """Where the parabola through the highest of some points and its neighbours has its top.

    At the edge of the grid: the edge.

    Args:
        points: (x, y) with x evenly spaced, in any order.
    """
    ordered = sorted(points)
    place = max(range(len(ordered)), key=lambda index: ordered[index][1])
    if place in (0, len(ordered) - 1):
        return ordered[place][0]
    (x0, y0), (x1, y1), (_, y2) = ordered[place - 1 : place + 2]
    return x1 + (x1 - x0) * (y0 - y2) / (2 * (y0 - 2 * y1 + y2))


#: By which the range is learned: K-FAC's evidence, and that of the exact curvature's columns.
EVIDENCES = {"K-FAC": "evidence", "columns": "evidence_columns"}


def report(lines: Sequence[Line], folder: Path) -> str:
    """The learned range by A, beside the α of the least test NLL, and a figure of the evidences."""
    rows, series = [], {}
    for (true,), those in grouped(lines, ("true",)).items():
        rows += [[f"{true}", name, *learned(those, key, true)] for name, key in EVIDENCES.items()]
        series[f"A = {true}°"] = sorted(by_alpha(those, "evidence"))
    curves(series, ("α in degrees", "log evidence"), folder / "rotation.png")
    header = ["A", "evidence", "learned α", "off by", "by seed"]
    return "# Learned range of rotations\n\n" + markdown(
        [*header, "α of the least test NLL", "seeds"], rows
    )


def by_alpha(lines: Sequence[Line], measure: str) -> list[tuple[float, float]]:
    """Means over seeds."""
    found = {alpha: mean_of(some, measure) for (alpha,), some in grouped(lines, ("alpha",)).items()}
    return [(alpha, mean.mean) for alpha, mean in found.items() if mean]


def learned(lines: Sequence[Line], evidence: str, true: float) -> list[str]:
    """Cells of the table: the range that an evidence chooses, and the best on test data."""
    chosen = top(by_alpha(lines, evidence))
    seeds = estimate(
        [
            top([(line.cell["alpha"], line.found[evidence]) for line in some])
            for some in grouped(lines, ("seed",)).values()
        ]
    )
    assert seeds is not None
    best = top([(alpha, -loss) for alpha, loss in by_alpha(lines, "nll")])
    return [f"{chosen:.0f}", f"{chosen / true - 1:+.0%}", seeds.text(".0f")] + [
        f"{best:.0f}",
        str(seeds.count),
    ]


ROTATION = Experiment(
    name="rotation",
    about="the range of rotations that the evidence chooses on rotated MNIST",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
