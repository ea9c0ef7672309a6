"""Figures of finished cells."""

from collections.abc import Sequence
from pathlib import Path


def scatter(
    points: Sequence[tuple[float, float, float]], labels: tuple[str, str, str], path: Path
) -> None:
    """Points (x, y) in the colour of a third number.

    Args:
        points: of (x, y, colour).
        labels: of the axes and of the colours.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    x, y, colour = zip(*points, strict=True)
    shown = axes.scatter(x, y, c=colour, cmap="viridis", s=18)
    figure.colorbar(shown, label=labels[2])
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.savefig(path, dpi=120)


def curves(
    series: dict[str, Sequence[tuple[float, float]]], labels: tuple[str, str], path: Path
) -> None:
    """One curve for each name.

    Args:
        series: points (x, y) by name.
        labels: of the axes.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend()
    figure.savefig(path, dpi=120)
