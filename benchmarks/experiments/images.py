"""Digits and MNIST: networks × numbers of training images × augmentation × seeds × methods."""

import argparse
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

from benchmarks.experiments import settings
from benchmarks.experiments.choices import names, numbers
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.image_methods import METHODS, Found, available, takes_part
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.networks import CLASSES, NETWORKS
from benchmarks.experiments.problem import Problem
from benchmarks.experiments.statistics import Measure
from benchmarks.experiments.tables import differences, means, summary

AUGMENTATION = {"none": (False,), "only": (True,), "both": (False, True)}


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells."""
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="how many seeds (default: 5)")
    add("--sizes", type=numbers, default=list(settings.EPOCHS), metavar="N,N",
        help="training images (default: 100,300,1000,5000)")  # fmt: skip
    add("--sets", type=names(list(settings.MOST)), default=list(settings.MOST))
    add("--networks", type=names(list(NETWORKS)), default=list(NETWORKS))
    add("--methods", type=names(list(METHODS)), default=available(),
        help=f"(default: all that can run; {', '.join(METHODS)})")  # fmt: skip
    add("--augmentation", choices=AUGMENTATION, default="both", help="(default: both)")
    add("--epochs", type=int, help="instead of those of the size")
    add("--test-images", type=int, default=settings.Counts.mode, help="at most (default: 10,000)")
    add("--posterior-images", type=int, default=settings.Counts.posterior,
        help="that posteriors predict (default: 500)")  # fmt: skip


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """All cells, a seed after another, methods innermost: they share what plain training gave."""
    for number, size, data, augment, network, method in product(
        range(chosen.seeds),
        chosen.sizes,
        chosen.sets,
        AUGMENTATION[chosen.augmentation],
        chosen.networks,
        [name for name in chosen.methods if name in available()],
    ):
        if size <= settings.MOST[data] and takes_part(method, network, size, augment):
            yield {
                "network": network,
                "data": data,
                "size": size,
                "augment": augment,
                "seed": settings.FIRST_SEED[data] + number,
                "epochs": chosen.epochs or settings.EPOCHS[size],
                "test": chosen.test_images,
                "few": chosen.posterior_images,
                "method": method,
            }


@lru_cache(maxsize=1)
def problem(**entries: object) -> Problem:
    """The last problem is kept: its plain network is what the next methods start from."""
    return Problem(**entries)  # type: ignore[arg-type]


def run(cell: Cell, place: Place) -> Found:
    """Train and predict by one method."""
    shared = ("network", "data", "size", "augment", "seed", "epochs")
    found = problem(
        **{name: cell[name] for name in shared},
        tests=settings.Counts(cell["test"], cell["few"]),
        device=place.device,
        folder=place.data,
    )
    return METHODS[cell["method"]](found)


# --- the report ----------------------------------------------------------------------------------

COLUMNS: dict[str, Measure] = {
    "accuracy": "accuracy",
    "NLL": "nll",
    "ECE": "ece",
    "Brier": "brier",
    "train NLL": "train_nll",
    "AUROC, other digits": "auroc_other",
    "AUROC, patches": "auroc_patches",
    "evidence:.0f": "evidence",
    "CPU s:.1f": "seconds",
}
PREDICTED: dict[str, Measure] = {
    "NLL of the mode": "few_nll",
    "NLL": "la_nll",
    "ECE of the mode": "few_ece",
    "ECE": "la_ece",
    "entropy": "la_entropy",
    "AUROC, other digits, of the mode": "auroc_other",
    "AUROC, other digits": "la_auroc_other",
    "AUROC, patches, of the mode": "auroc_patches",
    "AUROC, patches": "la_auroc_patches",
}
TUNED: dict[str, Measure] = {
    "moves from epoch:.0f": "first_move",
    "evidence:.0f": "evidence",
    "of the constant predictor:.0f": "constant_evidence",
    "γ:.0f": "effective_dimensions",
    "γ / N(C − 1):.2f": lambda line: share(line),
    "rounds, wall s:.1f": "round_seconds",
    "rounds / training, CPU:.2f": lambda line: extra(line),
    "warned:.2f": lambda line: float("warnings" in line.found),
}
GROUP = ("data", "size", "augment", "network")


def report(lines: Sequence[Line], folder: Path) -> str:
    """Tables: summary, paired differences, means, and the posterior's predictions."""
    predicted = [line for line in lines if "la_nll" in line.found]
    parts = {
        "NLL over all cells": summary(lines, GROUP, "nll", ("plain", "fixed", "grid")),
        "ECE over all cells": summary(lines, GROUP, "ece", ("plain", "fixed", "grid")),
        "NLL − plain, by seed": differences(lines, GROUP, "nll", "plain"),
        "NLL − grid, by seed": differences(lines, GROUP, "nll", "grid"),
        "ECE − plain, by seed": differences(lines, GROUP, "ece", "plain"),
        "NLL − plain, temperature after a second training on all images": differences(
            [line for line in lines if line.cell["method"] in ("plain", "temperature")],
            GROUP,
            refit_nll,
            "plain",
        ),
        "The mode": means(lines, GROUP, COLUMNS),
        "Predictions of the posterior, beside the mode's on the same images": means(
            predicted, GROUP, PREDICTED
        ),
        "Tuning": means([line for line in lines if "rounds" in line.found], GROUP, TUNED),
        "NLL of the posterior − of the mode": means(predicted, GROUP, {"NLL:+.3f": gap("nll")}),
    }
    texts = [f"## {title}\n\n{table}" for title, table in parts.items() if table]
    return "# Digits and MNIST\n\n" + "\n".join(texts)


def share(line: Line) -> float | None:
    """γ as a part of what the data can determine."""
    gamma = line.found.get("effective_dimensions")
    return None if gamma is None else gamma / (line.cell["size"] * (CLASSES - 1))


def extra(line: Line) -> float | None:
    """Processor time of the rounds over that of the training between them."""
    rounds = line.found.get("round_cpu_seconds")
    return None if rounds is None else rounds / (line.found["seconds"] - rounds)


def refit_nll(line: Line) -> float:
    """Of a network trained on all images, with the temperature where one was chosen."""
    return line.found.get("refit_nll", line.found["nll"])


def gap(measure: str) -> Measure:
    """The posterior's measure minus the mode's on the same images."""
    return lambda line: line.found[f"la_{measure}"] - line.found[f"few_{measure}"]


IMAGES = Experiment(
    name="images",
    about="digits and MNIST: plain, fixed and tuned weight decay, and predictions",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
