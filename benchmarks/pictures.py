"""A picture of each suite: points by case, or curves along an axis; all scales are logarithmic."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402  # after the choice of a backend without display
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import LogLocator, NullLocator  # noqa: E402

from benchmarks.cases import CONTENDERS  # noqa: E402
from benchmarks.rounds import Row  # noqa: E402

#: Okabe and Ito's palette, with greys for what it has no colour left for.
COLOURS = dict(
    zip(
        CONTENDERS,
        ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#7F7F7F",
         "#C0C0C0"),
        strict=True,
    )
)  # fmt: skip


def draw(suite: str, rows: Sequence[Row], path: Path) -> None:
    """Draw what gave numbers, and write it as PNG; nothing where there are none."""
    known = [row for row in rows if row["status"] == "ok"]
    if known:
        figure = curves(known) if suite == "scaling" else points(known)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def points(rows: Sequence[Row]) -> plt.Figure:
    """Multiples of a training step and peak memory, by case and contender."""
    titles = list(dict.fromkeys(row["title"] for row in rows))
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    height = 0.6 + 0.16 * len(names) * len(titles)
    figure, axes = plt.subplots(
        1, 2, figsize=(10, max(2.4, height)), sharey=True, layout="constrained"
    )
    thick = 0.8 / len(names)
    for k, name in enumerate(names):
        mine = [row for row in rows if row["contender"] == name]
        places = [titles.index(row["title"]) - 0.4 + (k + 0.5) * thick for row in mine]
        for ax, field in zip(axes, ("ratio", "peak_mib"), strict=True):
            values = [row[field] for row in mine]
            ax.scatter(values, places, s=14, color=COLOURS[name], label=name)
    for ax, label in zip(axes, ("multiples of training alone", "peak MiB"), strict=True):
        ax.set(xlabel=label, xscale="log")
        for y in range(1, len(titles)):
            ax.axhline(y - 0.5, color="0.9", linewidth=0.8, zorder=0)
        tidy(ax, "x")
    axes[0].set_yticks(range(len(titles)), titles, fontsize="x-small")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="x-small", frameon=False)
    return figure


def curves(rows: Sequence[Row]) -> plt.Figure:
    """Milliseconds against each axis."""
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], names, strict=True):
        for contender, colour in COLOURS.items():
            mine = [r for r in rows if r["axis"] == name and r["contender"] == contender]
            x = [row["size"].get(name) or row.get(name) for row in mine]
            y = [1000 * row["seconds"] for row in mine]
            if mine:
                ax.plot(x, y, marker="o", markersize=3.5, color=colour, label=contender)
        ax.set(xlabel=name, xscale="log", yscale="log")
        tidy(ax, "xy")
    axes[0, 0].set(ylabel="ms")
    axes[0, 0].legend(fontsize="x-small", frameon=False)
    return figure


def tidy(ax: Axes, logarithmic: str) -> None:
    """Open frame; plain numbers along the logarithmic axes."""
    ax.spines[["top", "right"]].set_visible(False)
    for name in logarithmic:
        axis = ax.xaxis if name == "x" else ax.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_locator(NullLocator())
