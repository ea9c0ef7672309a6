"""Pictures of calibration, evidence, hyperparameters and predictive bands.

Each function draws into axes that the caller made and returns nothing. `LivePlot` makes a figure of
its own, anew after each round of a tuner. Needs matplotlib.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kfac_laplace.errors import MissingPackage
from kfac_laplace.marglik.record import Record
from kfac_laplace.states.files import replacing

#: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def reliability(
    ax: Axes, predictions: Mapping[str, tuple[Tensor, Tensor]], n_bins: int = 15
) -> None:
    """Accuracy against confidence in bins of equal width; bins with under 5 points are left out.

    Args:
        ax: where to draw.
        predictions: label to probabilities (n, c) and true classes (n,).
        n_bins: number of bins.
    """
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    edges = np.linspace(0, 1, n_bins + 1)
    for colour, (name, (probs, labels)) in zip(COLOURS, predictions.items(), strict=False):
        confidence, predicted = probs.max(1)
        right, sure = (predicted == labels).numpy(), confidence.numpy()
        bins = np.clip(np.digitize(sure, edges) - 1, 0, n_bins - 1)
        kept = [b for b in range(n_bins) if (bins == b).sum() >= 5]
        x = [sure[bins == b].mean() for b in kept]
        y = [right[bins == b].mean() for b in kept]
        ax.plot(x, y, marker="o", markersize=3.5, color=colour, label=name)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    ax.set_title("Reliability")
    ax.legend(fontsize="x-small", frameon=False, loc="lower right")


def evidence(ax: Axes, histories: Mapping[str, Sequence[Record]]) -> None:
    """Log evidence over epochs, one line for each tuned run."""
    for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
        epochs = [record.epoch for record in history]
        ax.plot(epochs, [record.evidence for record in history], color=colour, label=name)
    ax.set(xlabel="epoch", ylabel="log evidence (nats)")
    ax.set_title("Evidence while training")
    ax.legend(fontsize="x-small", frameon=False)


def precisions_over_epochs(ax: Axes, history: Sequence[Record], names: Sequence[str]) -> None:
    """Prior precision of each group over epochs, on a logarithmic scale.

    Args:
        ax: where to draw.
        history: rounds of a tuned run.
        names: names of the groups; shown where they are few.
    """
    epochs = [record.epoch for record in history]
    values = np.stack([record.hyperparameters["prior_precision"].cpu() for record in history])
    lines = ax.plot(epochs, values, linewidth=1.2)
    if len(names) <= len(COLOURS):
        for line, name, colour in zip(lines, names, COLOURS, strict=False):
            line.set(label=name.removesuffix(".weight"), color=colour)
        ax.legend(title="layer", fontsize="x-small", title_fontsize="x-small", frameon=False)
    ax.set(xlabel="epoch", ylabel="prior precision δ", yscale="log")
    ax.set_title("Precisions choose themselves")


def precisions_by_layer(ax: Axes, names: Sequence[str], precision: Tensor) -> None:
    """Final prior precision of each group, first layer at the top."""
    places = np.arange(len(names))
    ax.barh(places, precision.cpu().numpy(), color=COLOURS[0], height=0.7)
    ax.set_yticks(places, [name.removesuffix(".weight") for name in names], fontsize="x-small")
    ax.invert_yaxis()
    ax.set(xlabel="prior precision δ", xscale="log")
    ax.set_title("Precision by layer")


def band(
    ax: Axes,
    x: Tensor,
    mean: Tensor,
    *,
    epistemic: Tensor,
    total: Tensor,
    seen: tuple[Tensor, Tensor],
) -> None:
    """Predictive mean with two standard deviations of the output, and with noise.

    Args:
        ax: where to draw.
        x: inputs, shape (n,), ascending.
        mean: predictive mean (n,).
        epistemic: standard deviation of the network's output (n,).
        total: standard deviation with observation noise (n,).
        seen: training inputs and targets.
    """
    ax.scatter(*seen, s=5, color="0.6", zorder=0, label="training data")
    for spread, alpha, name in ((total, 0.18, "with noise"), (epistemic, 0.4, "network alone")):
        ax.fill_between(
            x, mean - 2 * spread, mean + 2 * spread, color=COLOURS[0], alpha=alpha, linewidth=0,
            label=f"± 2 s.d., {name}",
        )  # fmt: skip
    ax.plot(x, mean, color=COLOURS[0], linewidth=1.5, label="mean")
    ax.set_title("Predictive band")
    ax.legend(fontsize="x-small", frameon=False)


def hyperparameters_over_epochs(ax: Axes, history: Sequence[Record]) -> None:
    """Precisions and noise over epochs on a logarithmic scale, also where groups come and go."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in history:
        for name, value in record.scalars().items():
            if name.partition("/")[0] in record.hyperparameters:
                curves.setdefault(name, []).append((record.epoch, value))
    few = len(curves) <= len(COLOURS)
    for place, (name, points) in enumerate(curves.items()):
        label = name.removeprefix("prior_precision/").removesuffix(".weight")
        colour = COLOURS[place] if few else None
        ax.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2)
    if few:
        ax.legend(fontsize="x-small", frameon=False)
    ax.set(xlabel="epoch", ylabel="prior precision δ, noise σ", yscale="log")
    ax.set_title("Hyperparameters")


class LivePlot:
    """Evidence and hyperparameters over epochs, drawn anew each time it is called.

    Args:
        path: a picture that is replaced as a whole, its suffix says of which kind; None for the
            output of a notebook's cell, where the picture takes the place of the one before.

    Raises:
        MissingPackage: no path, and no IPython.

    Example:
        `live = LivePlot("marglik.png")`, and `live(tuner.history)` after each round.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self._shown: Any = None
        if path is None:
            try:
                import IPython  # noqa: F401 - whether it is there
            except ImportError:
                raise MissingPackage(
                    "a notebook is needed to show a picture in",
                    where="path",
                    remedy="Pass a path, which any viewer of pictures may watch",
                ) from None

    def __call__(self, history: Sequence[Record]) -> None:
        """Draw the rounds so far; nothing before the first."""
        if not history:
            return
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        evidence(left, {"evidence": history})
        hyperparameters_over_epochs(right, history)
        if self.path is None:
            self._show(figure)
            return
        with replacing(self.path) as fresh:
            figure.savefig(fresh, format=Path(self.path).suffix[1:] or "png")

    def _show(self, figure: Figure) -> None:
        from IPython import display

        if self._shown is None:
            show: Any = display.display  # without annotations
            self._shown = show(figure, display_id=True)
        else:
            self._shown.update(figure)
