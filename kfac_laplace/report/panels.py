"""What the pictures of a report show, as plain data: whoever draws them needs nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from kfac_laplace.report.means import BINS, ClassRows, ValueRows
from kfac_laplace.report.ways import ENTROPY, Way
from kfac_laplace.summary import Line

Rows = TypeVar("Rows", ClassRows, ValueRows)

#: Most points of a curve, and most bars.
POINTS, BARS = 200, 24


@dataclass
class Found:
    """What a way of predicting found.

    Args:
        way: the way.
        rows: what its predictions are worth.
        usual: scores of how strange test data are.
        strange: those of strange inputs.
    """

    way: Way
    rows: ClassRows | ValueRows
    usual: dict[str, Tensor] | None = None
    strange: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Curve:
    """Points of one line, outline or set of bars.

    Args:
        name: as the legend has it.
        colour: number of its colour; the ways to predict have the same one everywhere.
        x: abscissae; edges of the bins of an outline, one more than y.
        y: ordinates.
        dashed: whether it is of strange inputs.
    """

    name: str
    colour: int
    x: list[float]
    y: list[float]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        title: its heading.
        x: label of the abscissa.
        y: label of the ordinate.
        says: what it shows, in words with numbers.
        curves: what is drawn.
        form: points joined by lines, outlines of histograms, or horizontal bars.
        labels: names of the bars.
        ideal: the line on which curves should lie: "diagonal", "one" or none.
        below: a smaller picture under it with the same abscissa.
        logarithmic: whether bars have a logarithmic scale.
    """

    title: str
    x: str
    y: str
    says: str
    curves: list[Curve]
    form: Literal["points", "line", "outline", "bars"] = "line"
    labels: list[str] = field(default_factory=list)
    ideal: Literal["", "diagonal", "one"] = ""
    below: "Panel | None" = None
    logarithmic: bool = False


def panels(test: Sequence[Found], layers: Sequence[Line]) -> list[Panel]:
    """All pictures of a report."""
    found = []
    classes = [(turn, one.way.name, one.rows) for turn, one in enumerate(test)
               if isinstance(one.rows, ClassRows)]  # fmt: skip
    values = [(turn, one.way.name, one.rows) for turn, one in enumerate(test)
              if isinstance(one.rows, ValueRows) and one.rows.ranks.numel()]  # fmt: skip
    if classes:
        found += [_reliability(classes), _risk(classes)]
    if values:
        found += [_coverage(values), _ranks(values)]
    if test[0].strange is not None:
        found.append(_entropies(test))
    return [*found, *_by_layer(layers)]


def _distinct(
    entries: Sequence[tuple[int, str, Rows]], points: Callable[[Rows], tuple[Tensor, Tensor]]
) -> list[Curve]:
    """A curve for each way, but one for those that predict the same."""
    curves: list[Curve] = []
    for turn, name, rows in entries:
        x, y = (part.tolist() for part in points(rows))
        if all((x, y) != (other.x, other.y) for other in curves):
            curves.append(Curve(name, turn, x, y))
    return curves


def _reliability(entries: Sequence[tuple[int, str, ClassRows]]) -> Panel:
    """Accuracy against confidence by bin, over the number of rows in each."""

    def points(rows: ClassRows) -> tuple[Tensor, Tensor]:
        return reliability(rows)[:2]

    edges = torch.linspace(0, 1, BINS + 1).tolist()
    curves = _distinct(entries, points)
    shown = {curve.colour for curve in curves}
    counts = [
        Curve(name, turn, edges, torch.bincount(rows.bins, minlength=BINS).tolist())
        for turn, name, rows in entries
        if turn in shown
    ]
    errors = "; ".join(
        f"{name}: ECE {float(rows.sums[:, 5:].sum(0).abs().sum()) / len(rows.example):.3f}"
        for turn, name, rows in entries
        if turn in shown
    )
    return Panel(
        "Reliability",
        "confidence",
        "accuracy",
        f"Accuracy against confidence in {BINS} bins, and the number of predictions in each. {errors}.",
        curves,
        "points",
        ideal="diagonal",
        below=Panel("", "confidence", "count", "", counts, "outline"),
    )


def reliability(rows: ClassRows) -> tuple[Tensor, Tensor, Tensor]:
    """Mean confidence, accuracy and number of rows of each bin that has some."""
    counts = torch.bincount(rows.bins, minlength=BINS).double()
    some = counts > 0
    means = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, rows.bins, column)[some] / counts[some]
        for column in (rows.confidence, rows.correct)
    )
    confidence, accuracy = means
    return confidence, accuracy, counts[some]


def _risk(entries: Sequence[tuple[int, str, ClassRows]]) -> Panel:
    """The error rate of the surest, over how many of them are answered."""
    curves = _distinct(entries, risk_curve)
    said = "; ".join(f"{one.name}: {one.y[-1]:.3f} when all are answered" for one in curves)
    return Panel(
        "Risk and coverage",
        "share answered, surest first",
        "error rate",
        f"Error rate among the surest predictions. {said}.",
        curves,
    )


def risk_curve(rows: ClassRows) -> tuple[Tensor, Tensor]:
    """Coverage and error rate of the surest rows, at most `POINTS` of them."""
    wrong = (1 - rows.correct)[(-rows.confidence).argsort(stable=True)]
    count = torch.arange(1, len(wrong) + 1, dtype=torch.float64)
    risk = wrong.cumsum(0) / count
    kept = torch.linspace(0, len(wrong) - 1, min(POINTS, len(wrong))).round().long()
    return (count / len(wrong))[kept], risk[kept]


def _coverage(entries: Sequence[tuple[int, str, ValueRows]]) -> Panel:
    """The share of targets in intervals of every probability."""
    levels = torch.linspace(0, 1, 41, dtype=torch.float64)

    def points(rows: ValueRows) -> tuple[Tensor, Tensor]:
        central = (2 * rows.ranks.flatten() - 1).abs().sort().values
        return levels, torch.searchsorted(central, levels, right=True) / len(central)

    curves = _distinct(entries, points)
    said = "; ".join(f"{one.name}: {one.y[36]:.2f} in 90 % intervals" for one in curves)
    return Panel(
        "Coverage of intervals",
        "probability of the interval",
        "share of targets inside",
        f"Share of targets in central intervals. {said}.",
        curves,
        ideal="diagonal",
    )


def _ranks(entries: Sequence[tuple[int, str, ValueRows]]) -> Panel:
    """Where targets lie in their predictive distributions: evenly, if those are right."""
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)

    def points(rows: ValueRows) -> tuple[Tensor, Tensor]:
        ranks = rows.ranks.flatten().clamp(0, 1)
        return edges, torch.histc(ranks, 10, 0.0, 1.0) * 10 / len(ranks)

    return Panel(
        "Ranks of targets",
        "rank of the target in its prediction (PIT)",
        "density",
        "Histogram of the probability integral transform: flat where predictions are right, "
        "a valley where they are too sure, a hill where they are too wide.",
        _distinct(entries, points),
        "outline",
        ideal="one",
    )


def _entropies(test: Sequence[Found]) -> Panel:
    """Entropies of test data and of strange inputs, of the mode and of the last way."""
    shown = [
        (turn, f"{one.way.name}: {kind}", scores[ENTROPY], kind == "strange")
        for turn, one in enumerate(test)
        if turn in (0, len(test) - 1)
        for kind, scores in (("test", one.usual), ("strange", one.strange))
        if scores is not None
    ]
    low = min(float(scores.min()) for *_, scores, _ in shown)
    high = max(float(scores.max()) for *_, scores, _ in shown)
    high = high if high > low else low + 1
    edges = torch.linspace(low, high, 26, dtype=torch.float64).tolist()
    curves = [
        Curve(name, turn, edges, (torch.histc(scores, 25, low, high) / len(scores)).tolist(), dashed)
        for turn, name, scores, dashed in shown
    ]
    means = "; ".join(f"{name}: {float(scores.mean()):.3f} on average" for _, name, scores, _ in shown)
    return Panel(
        "Entropies in and out of distribution",
        "entropy of the prediction (nats)",
        "share of inputs",
        f"Histograms of the entropy of predictions. {means}.",
        curves,
        "outline",
    )


def _by_layer(layers: Sequence[Line]) -> list[Panel]:
    """Precisions and effective dimensions of the groups that the data determine most."""
    groups = [line for line in layers if line.delta is not None]
    if not groups:
        return []
    most = sorted(groups, key=lambda line: line.gamma, reverse=True)[:BARS]
    shown = [line for line in groups if line in most]
    of = "" if len(shown) == len(groups) else f" ({len(shown)} of {len(groups)} groups, by γ)"
    names = [line.name for line in shown]
    deltas = [(low * high) ** 0.5 for low, high in (line.delta for line in shown if line.delta)]
    gammas = [line.gamma for line in shown]
    places = [float(place) for place in range(len(shown))]
    return [
        Panel("Prior precision by layer", "δ", "", f"Prior precisions{of}, from {min(deltas):.3g} "
              f"to {max(deltas):.3g}.", [Curve("δ", 0, deltas, places)], "bars", names,
              logarithmic=True),
        Panel("Effective dimensions by layer", "γ", "", f"Directions that the data determine{of}; "
              f"{sum(line.gamma for line in groups):.4g} in all.",
              [Curve("γ", 0, gammas, places)], "bars", names),
    ]  # fmt: skip
