"""The paper's experiment: a Wide ResNet with Fixup on CIFAR-10, tuned by expand and by reduce.

SGD with momentum on a cosine from 0.1, Fixup's scalars at a tenth of that; a round every five
epochs after a tenth of them, 100 hyperparameter steps [KFAC23, section 4.3]. The images are JPEG
copies of CIFAR-10, which are lossy.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.experiments.augmentation import flipped_and_cropped
from benchmarks.experiments.data import cifar10
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.fixup import WideResNet
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.measures import logits_of, predicted, quality
from benchmarks.experiments.networks import seeded
from benchmarks.experiments.statistics import Measure, grouped
from benchmarks.experiments.tables import differences, markdown, means
from benchmarks.experiments.training import Fit, Recipe, Rounds, train
from kfac_laplace import MarglikTuner
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.metrics import nll

WEIGHT_DECAY, LEARNING_RATE, MOMENTUM = 5e-4, 0.1, 0.9
FREQUENCY, HYPERSTEPS = 5, 100


@dataclass(frozen=True)
class Size:
    """What makes the experiment larger or smaller.

    Args:
        width: k of WRN-16-k.
        images: training images.
        side: of the images, averaged down from 32.
        epochs: passes over them.
        batch: in a mini-batch.
        test: images to test on.
        few: of these, that posteriors predict.
    """

    width: int
    images: int
    side: int
    epochs: int
    batch: int
    test: int
    few: int


#: Ten runs of one seed: ten minutes of one core, and 25 minutes of an H100.
PRESETS = {
    "cpu": Size(1, 1000, 16, 50, 50, 2000, 200),
    "gpu": Size(4, 10_000, 32, 60, 128, 10_000, 1000),
}


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells, and how large."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="(default: cpu)")
    add("--seeds", type=int, default=1, help="how many (default: 1)")
    for name in Size.__dataclass_fields__:
        add(f"--{name}", type=int, help="instead of the preset's")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """{SGD, expand, reduce} × {augmentation, none} × {exact, mc} × seeds."""
    size = asdict(PRESETS[chosen.preset])
    size |= {name: value for name in size if (value := getattr(chosen, name)) is not None}
    for seed, augment in product(range(chosen.seeds), (False, True)):
        for method in ("sgd", "expand-mc", "reduce-mc", "expand-exact", "reduce-exact"):
            yield {**size, "augment": augment, "seed": seed, "method": method}


def sgd(model: nn.Module, weight_decay: float) -> Optimizer:
    """SGD with momentum, its rate smaller for Fixup's scalars."""
    assert isinstance(model, WideResNet)
    scalars = model.scalars()
    few = {id(parameter) for parameter in scalars}
    matrices = [parameter for parameter in model.parameters() if id(parameter) not in few]
    groups = [{"params": matrices}, {"params": scalars, "lr": LEARNING_RATE / 10}]
    return torch.optim.SGD(groups, lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=weight_decay)


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train, with or without rounds, and predict."""
    size = Size(**{name: cell[name] for name in Size.__dataclass_fields__})
    training, test = images(size, cell["seed"], place)
    model = seeded(lambda: WideResNet(size.width), cell["seed"], place.device)
    augment = flipped_and_cropped if cell["augment"] else None
    recipe = Recipe(size.epochs, sgd, augment, cell["seed"], size.batch)
    if cell["method"] == "sgd":
        fit = train(model, training, recipe, weight_decay=WEIGHT_DECAY)
        return measured(fit, training, test)
    approx, fisher = cell["method"].split("-")
    tuner = MarglikTuner(
        model,
        "classification",
        size.images,
        prior_precision=WEIGHT_DECAY * size.images,
        kfac_approx=approx,
        fisher=fisher,
        n_epochs_burnin=max(1, size.epochs // 10),
        marglik_frequency=FREQUENCY,
        n_hypersteps=HYPERSTEPS,
    )
    fit = train(model, training, recipe, tuner=tuner)
    return measured(fit, training, test) | of_rounds(tuner) | posterior(tuner, training, test, size)


def images(size: Size, seed: int, place: Place) -> tuple[Split, Split]:
    """Training images by seed, standardised by channel, and the same test images always."""
    parts = (
        cifar10("train", size.images, size.side, seed, place.data),
        cifar10("test", size.test, size.side, 0, place.data),
    )
    mean, std = (getattr(parts[0].x, name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    first, second = (
        Split(((part.x - mean) / std).to(place.device), part.y.to(place.device)) for part in parts
    )
    return first, second


def measured(fit: Fit, training: Split, test: Split) -> dict[str, float]:
    """Quality of the mode and costs."""
    probs, seen = (logits_of(fit.model, part.x).softmax(-1) for part in (test, training))
    return quality(probs, test.y) | {"train_nll": nll(seen, training.y)} | fit.costs


def of_rounds(tuner: MarglikTuner) -> dict[str, Any]:
    """What rounds took on the clock, by part, and where they led."""
    records = tuner.history
    curvature = sum(record.curvature_seconds for record in records)
    final = tuner.hyperparameters()["prior_precision"].tolist()
    return {
        "rounds": len(records),
        "curvature_seconds": curvature,
        "hyperstep_seconds": sum(record.seconds for record in records) - curvature,
        "evidence": records[-1].evidence,
        "effective_dimensions": float(records[-1].effective_dimensions.sum()),
        "constant_evidence": records[-1].constant_evidence,
        "precisions": dict(zip(tuner.groups, final, strict=True)),
    }


def posterior(tuner: MarglikTuner, training: Split, test: Split, size: Size) -> dict[str, float]:
    """Predictions of the posterior for the first test images, and of the mode for the same."""
    la = tuner.laplace(Rounds(training))
    x, y = test.x[: size.few], test.y[: size.few]
    mode = quality(logits_of(tuner.model, x).softmax(-1), y)
    found = quality(predicted(la, x)[0], y)
    return {f"la_{k}": v for k, v in found.items()} | {f"few_{k}": v for k, v in mode.items()}


# --- the report ----------------------------------------------------------------------------------

SIZES = ("width", "images", "side", "epochs", "augment")
COLUMNS: dict[str, Measure] = {
    "accuracy": "accuracy",
    "NLL": "nll",
    "ECE": "ece",
    "train NLL": "train_nll",
    "evidence:.0f": "evidence",
    "CPU s:.1f": "seconds",
    "of rounds:.1f": "round_cpu_seconds",
    "wall s:.1f": "wall_seconds",
    "curvature:.1f": "curvature_seconds",
    "hypersteps:.1f": "hyperstep_seconds",
    "NLL of the mode, few": "few_nll",
    "NLL of the posterior": "la_nll",
    "its ECE": "la_ece",
}


def report(lines: Sequence[Line], folder: Path) -> str:
    """Tables: means, differences to SGD, and what reduce costs beside expand."""
    text = (
        "# WRN-16-k with Fixup on CIFAR-10\n\nImages are JPEG copies, which are lossy.\n\n"
        f"{means(lines, SIZES, COLUMNS)}\n"
    )
    errors: tuple[tuple[str, Measure], ...] = (
        ("NLL", "nll"),
        ("Error rate", lambda line: 1 - line.found["accuracy"]),
    )
    for title, measure in errors:
        text += f"## {title} − SGD, by seed\n\n{differences(lines, SIZES, measure, 'sgd')}\n"
    return text + "## Rounds of reduce beside those of expand\n\n" + ratios(lines)


def ratios(lines: Sequence[Line]) -> str:
    """Seconds of rounds, reduce over expand, by seed."""
    rows = []
    for group, those in grouped(lines, (*SIZES, "seed")).items():
        for fisher, name in product(("exact", "mc"), ("round_cpu_seconds", "curvature_seconds")):
            found = {line.cell["method"]: line.found for line in those if name in line.found}
            reduce, expand = (found.get(f"{approx}-{fisher}") for approx in ("reduce", "expand"))
            if reduce and expand:
                rows.append([*map(str, group), fisher, name, f"{reduce[name] / expand[name]:.2f}"])
    return markdown([*SIZES, "seed", "Fisher", "seconds", "reduce / expand"], rows)


WRN = Experiment(
    name="wrn",
    about="WRN-16-k with Fixup on CIFAR-10: SGD, and tuned by expand and by reduce",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
