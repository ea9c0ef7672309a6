"""Model selection: evidence of tuned networks against their test NLL, over depths and widths."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import nn

from benchmarks.experiments import settings
from benchmarks.experiments.choices import names, numbers
from benchmarks.experiments.data import images
from benchmarks.experiments.experiment import Experiment, Place
from benchmarks.experiments.figures import scatter
from benchmarks.experiments.lines import Cell, Line
from benchmarks.experiments.measures import logits_of, quality
from benchmarks.experiments.networks import cnn, mlp, seeded
from benchmarks.experiments.statistics import Measure, grouped, mean_of
from benchmarks.experiments.tables import markdown, means
from benchmarks.experiments.training import Recipe, Rounds, adam, train
from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.metrics import nll

DEPTHS = (1, 2, 3, 4)
WIDTHS = {"mlp": (8, 16, 64, 256), "cnn": (4, 8, 16, 32)}
#: Evidences beside that of K-FAC, where the library has them.
OTHERS = ("columns",)


def network(kind: str, depth: int, width: int) -> nn.Module:
    """A network for images of 16 × 16."""
    return mlp(16, width, depth) if kind == "mlp" else cnn(16, widths=(width,) * depth)


def options(parser: argparse.ArgumentParser) -> None:
    """Which cells."""
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="how many (default: 3)")
    add("--networks", type=names(list(WIDTHS)), default=list(WIDTHS))
    add("--depths", type=numbers, default=list(DEPTHS), metavar="N,N")
    add("--widths", type=numbers, metavar="N,N", help="instead of the network's")
    add("--size", type=int, default=1000, help="training images (default: 1000)")
    add("--epochs", type=int, help="instead of those of the size")
    add("--test-images", type=int, default=10_000, help="at most (default: 10,000)")


def cells(chosen: argparse.Namespace) -> Iterator[Cell]:
    """Networks × depths × widths × seeds, a seed after another."""
    for seed, kind, depth in product(range(chosen.seeds), chosen.networks, chosen.depths):
        for width in chosen.widths or WIDTHS[kind]:
            yield {
                "network": kind,
                "depth": depth,
                "width": width,
                "size": chosen.size,
                "seed": seed,
                "epochs": chosen.epochs or settings.EPOCHS[chosen.size],
                "test": chosen.test_images,
                "method": "tuned",
            }


def run(cell: Cell, place: Place) -> dict[str, Any]:
    """Train with the default tuner; evidence on the training images, quality on the test images."""
    seed, size = cell["seed"], cell["size"]
    found = images("mnist", size, seed, (cell["test"], 1), place.data)
    training, test = (Split(part.x.to(place.device), part.y.to(place.device)) for part in found[:2])
    model = seeded(
        lambda: network(cell["network"], cell["depth"], cell["width"]), seed, place.device
    )
    tuner = MarglikTuner(model, "classification", size, marglik_frequency=settings.FREQUENCY)
    recipe = Recipe(cell["epochs"], adam(settings.LEARNING_RATE[cell["network"]]), None, seed)
    fit = train(model, training, recipe, tuner=tuner)
    la = tuner.laplace(Rounds(training))
    result = quality(logits_of(model, test.x).softmax(-1), test.y) | fit.costs
    return result | {
        "train_nll": nll(logits_of(model, training.x).softmax(-1), training.y),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evidence": float(la.log_marginal_likelihood()),
        **others(la),
    }


def others(la: Laplace) -> dict[str, float]:
    """Other evidences at the same hyperparameters."""
    if not hasattr(Laplace, "evidence"):
        return {}
    return {f"evidence_{name}": float(la.evidence(name).value) for name in OTHERS}


# --- the report ----------------------------------------------------------------------------------

EVIDENCES = ("evidence", *(f"evidence_{name}" for name in OTHERS))
COLUMNS: dict[str, Measure] = {
    "test NLL": "nll",
    "accuracy": "accuracy",
    "train NLL": "train_nll",
    "evidence:.0f": "evidence",
    "evidence, columns:.0f": "evidence_columns",
}


def report(lines: Sequence[Line], folder: Path) -> str:
    """Rank correlations, means by architecture and a scatter for each kind of network."""
    rows = []
    for (kind,), those in grouped(lines, ("network",)).items():
        for evidence in EVIDENCES:
            known = [line for line in those if evidence in line.found]
            if known:
                rows.append([kind, evidence, str(len(known)), *correlations(known, evidence)])
        scatter(
            [(line.found["evidence"], line.found["nll"], line.cell["depth"]) for line in those],
            ("log evidence", "test NLL", "depth"),
            folder / f"selection-{kind}.png",
        )
    header = ["network", "evidence", "n", "all", "within a seed", "means over seeds"]
    table = markdown(header, rows)
    return (
        "# Evidence against test NLL\n\nSpearman's correlation of evidence and −NLL, over all "
        "networks, within each seed, and of means over seeds.\n\n"
        f"{table}\n{means(lines, ('network', 'depth', 'width'), COLUMNS)}"
    )


def correlations(lines: Sequence[Line], evidence: str) -> list[str]:
    """Over all lines, by seed, and of the means over seeds."""
    by_seed = grouped(lines, ("seed",)).values()
    networks = grouped(lines, ("depth", "width")).values()
    means_over_seeds = [
        (mean.mean, loss.mean)
        for those in networks
        if (mean := mean_of(those, evidence)) and (loss := mean_of(those, "nll"))
    ]
    return [
        correlation(pairs(lines, evidence)),
        ", ".join(correlation(pairs(those, evidence)) for those in by_seed),
        correlation(means_over_seeds),
    ]


def pairs(lines: Sequence[Line], evidence: str) -> list[tuple[float, float]]:
    """Evidence and loss of each line."""
    return [(line.found[evidence], line.found["nll"]) for line in lines]


def correlation(points: Sequence[tuple[float, float]]) -> str:
    """Spearman's, of evidence and −loss."""
    if len(points) < 3:
        return "–"
    evidence, loss = zip(*points, strict=True)
    return f"{-spearmanr(evidence, loss).statistic:+.2f}"


SELECTION = Experiment(
    name="selection",
    about="evidence against test NLL over depths, widths and seeds",
    options=options,
    cells=cells,
    run=run,
    report=report,
)
