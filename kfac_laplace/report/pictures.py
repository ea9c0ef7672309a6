"""The pictures of a report: calibration, when to answer, strange inputs, layers."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kfac_laplace.report.found import Found
from kfac_laplace.report.means import BINS, ClassRows, ValueRows
from kfac_laplace.report.panels import Curve, Panel, histogram, merged
from kfac_laplace.report.ways import ENTROPY
from kfac_laplace.summary import Line

#: Most points of a curve, and most bars.
POINTS, BARS = 200, 24

#: Number of the colour of test data where those of ways would mislead, and of strange inputs.
USUAL, STRANGE = 0, 1

Rows = TypeVar("Rows", ClassRows, ValueRows)
#: Number of a way, its short name, and its rows.
Entry = tuple[int, str, Rows]


def panels(test: Sequence[Found], layers: Sequence[Line]) -> list[Panel]:
    """All pictures of a report."""
    made = []
    classes = [(turn, one.way.short, one.rows) for turn, one in enumerate(test)
               if isinstance(one.rows, ClassRows)]  # fmt: skip
    values = [(turn, one.way.short, one.rows) for turn, one in enumerate(test)
              if isinstance(one.rows, ValueRows) and one.rows.ranks.numel()]  # fmt: skip
    if classes:
        made += [_reliability(classes), _risk(classes)]
    if values:
        made += [_coverage(values), _ranks(values)]
    if test[0].strange is not None:
        made += [panel for one in (test[0], test[-1]) if (panel := _entropies(one)) is not None]
    return [*made, *_by_layer(layers)]


def _curves(
    entries: Sequence[Entry[Rows]], points: Callable[[Rows], tuple[Tensor, Tensor]]
) -> list[Curve]:
    """A curve for each way, where ways that predict the same have one together."""
    made = []
    for turn, name, rows in entries:
        x, y = points(rows)
        made.append(Curve(name, turn, x.tolist(), y.tolist()))
    return merged(made)


def _said(curves: Sequence[Curve], number: Callable[[Curve], str]) -> str:
    """A number of each curve, by name."""
    return "; ".join(f"{curve.name}: {number(curve)}" for curve in curves)


def _reliability(entries: Sequence[Entry[ClassRows]]) -> Panel:
    """Accuracy against confidence by bin, over the number of rows in each."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device="cpu")

    def counts(rows: ClassRows) -> tuple[Tensor, Tensor]:
        return edges, torch.bincount(rows.bins, minlength=BINS).double()

    curves = _curves(entries, reliability)
    errors = {turn: float(rows.sums[:, 5:].sum(0).abs().sum() / len(rows.example))
              for turn, _, rows in entries}  # fmt: skip
    return Panel(
        "Reliability",
        "confidence",
        "accuracy",
        f"Accuracy against confidence in {BINS} bins, over the number of predictions in each. "
        f"Mean distance from the diagonal (ECE): "
        f"{_said(curves, lambda curve: f'{errors[curve.colour]:.3f}')}.",
        curves,
        "points",
        ideal="diagonal",
        below=Panel(
            "", "confidence", "count", "", _curves(entries, counts), "outline", logarithmic=True
        ),
    )


def reliability(rows: ClassRows) -> tuple[Tensor, Tensor]:
    """Mean confidence and accuracy of each bin that has rows."""
    counts = torch.bincount(rows.bins, minlength=BINS).double()
    some = counts > 0
    confidence, accuracy = (
        counts.new_zeros(BINS).index_add_(0, rows.bins, column)[some] / counts[some]
        for column in (rows.confidence, rows.correct)
    )
    return confidence, accuracy


def _risk(entries: Sequence[Entry[ClassRows]]) -> Panel:
    """The error rate of the surest, over how many of them are answered."""
    curves = _curves(entries, risk_curve)

    def halfway(curve: Curve) -> str:
        return f"{curve.y[len(curve.y) // 2]:.3f}"

    return Panel(
        "Risk and coverage",
        "share answered, surest first",
        "error rate",
        f"Error rate of the surest predictions: {curves[0].y[-1]:.3f} of the network when all are "
        f"answered, and of the surer half {_said(curves, halfway)}.",
        curves,
    )


def risk_curve(rows: ClassRows) -> tuple[Tensor, Tensor]:
    """Coverage and error rate of the surest rows, at most `POINTS` of them."""
    wrong = (1 - rows.correct)[(-rows.confidence).argsort(stable=True)]
    count = torch.arange(1, len(wrong) + 1, dtype=torch.float64, device="cpu")
    kept = torch.linspace(0, len(wrong) - 1, min(POINTS, len(wrong)), device="cpu").round().long()
    return (count / len(wrong))[kept], (wrong.cumsum(0) / count)[kept]


def _coverage(entries: Sequence[Entry[ValueRows]]) -> Panel:
    """The share of targets in intervals of every probability."""
    levels = torch.linspace(0, 1, 41, dtype=torch.float64, device="cpu")

    def points(rows: ValueRows) -> tuple[Tensor, Tensor]:
        central = (2 * rows.ranks.flatten() - 1).abs().sort().values
        return levels, torch.searchsorted(central, levels, right=True) / len(central)

    curves = _curves(entries, points)
    return Panel(
        "Coverage of intervals",
        "probability of the interval",
        "share of targets inside",
        "Share of targets inside central intervals; of 90 % intervals "
        f"{_said(curves, lambda curve: f'{curve.y[36]:.3f}')}.",
        curves,
        ideal="diagonal",
    )


def _ranks(entries: Sequence[Entry[ValueRows]]) -> Panel:
    """Where targets lie in their predictive distributions: evenly, if those are right."""
    edges = torch.linspace(0, 1, 11, dtype=torch.float64, device="cpu")

    def points(rows: ValueRows) -> tuple[Tensor, Tensor]:
        return edges, 10 * torch.tensor(histogram(rows.ranks.flatten(), edges), device="cpu")

    return Panel(
        "Ranks of targets",
        "rank of the target in its prediction (PIT)",
        "density",
        "Histogram of the probability integral transform: flat where predictions are right, a "
        "valley where they are too sure, a hill where they are too wide.",
        _curves(entries, points),
        "outline",
        ideal="one",
    )


def _entropies(found: Found) -> Panel | None:
    """Entropies of test data and of strange inputs as one way has them; None where all are equal.

    They are where the noise alone says how uncertain the network is.
    """
    assert found.usual is not None and found.strange is not None
    usual, strange = found.usual[ENTROPY], found.strange[ENTROPY]
    both = torch.cat([usual, strange])
    low, high = float(both.min()), float(both.max())
    if high - low <= 1e-9 * max(1.0, abs(high)):
        return None
    edges = torch.linspace(low, high, 26, dtype=torch.float64, device="cpu")
    at = edges.tolist()
    return Panel(
        f"Entropies: {found.way.name}",
        "entropy of the prediction (nats)",
        "share of inputs",
        f"Entropies are {float(usual.mean()):.3f} of test data and {float(strange.mean()):.3f} of "
        "strange inputs on average.",
        [
            Curve("test data", USUAL, at, histogram(usual, edges), filled=True),
            Curve("strange inputs", STRANGE, at, histogram(strange, edges)),
        ],
        "outline",
        logarithmic=True,
    )


def _by_layer(layers: Sequence[Line]) -> list[Panel]:
    """Precisions and effective dimensions of the groups that the data determine most."""
    groups = [line for line in layers if line.delta is not None]
    if not groups:
        return []
    most = sorted(groups, key=lambda line: line.gamma, reverse=True)[:BARS]
    shown = [line for line in groups if line in most]
    of = "" if len(shown) == len(groups) else f" (the {BARS} of {len(groups)} groups of largest γ)"
    names = [line.name for line in shown]
    deltas = [(low * high) ** 0.5 for low, high in (line.delta for line in shown if line.delta)]
    places = [float(place) for place in range(len(shown))]
    total = sum(line.gamma for line in groups)
    precisions = Panel(
        "Prior precision by layer",
        "δ",
        "",
        f"Prior precisions δ{of}, from {min(deltas):.3g} to {max(deltas):.3g}.",
        [Curve("δ", 0, deltas, places)],
        "dots",
        names,
        logarithmic=True,
    )
    directions = Panel(
        "Effective dimensions by layer",
        "γ",
        "",
        f"Directions γ that the data determine{of}, {total:.4g} in all.",
        [Curve("γ", 0, [line.gamma for line in shown], places)],
        "bars",
        names,
    )
    return [precisions, directions]
