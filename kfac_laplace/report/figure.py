"""Panels drawn by matplotlib: all in one figure, or each as SVG for a page.

Figures are made without pyplot, whose state belongs to the caller.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure as Figure
from matplotlib.figure import SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kfac_laplace.report.panels import Panel

#: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#1F2328", "#8C959F"
#: Lines differ by stroke and mark as well: colours are not all that tells them apart.
STROKES, MARKS = ("-", "--", "-.", ":"), ("o", "s", "^", "D")
#: Longest name of a bar that is written out.
LONGEST = 26
WIDTH, HEIGHT = 4.6, 3.5

#: Colours of a drawing by the names that the page's style sheet has for them, in both themes.
VARIABLES = {
    **{colour.lower(): f"var(--c{turn})" for turn, colour in enumerate(COLOURS)},
    INK.lower(): "var(--ink)",
    FAINT.lower(): "var(--faint)",
}
STYLE: dict[Any, Any] = {  # the stubs name the keys one by one
    "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8,
    "svg.fonttype": "path", "axes.titlesize": 10,
}  # fmt: skip


def overview(panels: Sequence[Panel], head: str) -> Figure:
    """All panels, two in a row, under a title."""
    with matplotlib.rc_context(STYLE):
        rows = max(1, -(-len(panels) // 2))
        figure = Figure(figsize=(2 * WIDTH, rows * HEIGHT + 0.4), layout="constrained")
        figure.suptitle(_plain(head), fontsize=9)
        cells = figure.subfigures(rows, 2, squeeze=False).flat
        for panel, cell in zip(panels, cells, strict=False):
            draw(cell, panel, title=True)
        return figure


def svg(panel: Panel, prefix: str) -> str:
    """A panel as an `<svg>` element, whose colours are the page's and whose ids begin alike."""
    size = (WIDTH, 0.26 * len(panel.labels) + 0.7 if panel.labels else HEIGHT)
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "kfac-laplace"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, panel, title=False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _embedded(text.getvalue(), prefix)


def _embedded(text: str, prefix: str) -> str:
    """The element alone, with ids that no other drawing has and colours that follow the theme."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for mark in (' id="', "url(#", 'href="#'):
        text = text.replace(mark, f"{mark}{prefix}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def draw(figure: Figure | SubFigure, panel: Panel, *, title: bool) -> None:
    """Draw a panel, and what is below it, into a figure."""
    if panel.below is None:
        ax = figure.subplots()
        _content(ax, panel)
    else:
        ax, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _content(ax, panel)
        ax.set_xlabel("")
        _content(lower, panel.below)
    if title:
        ax.set_title(_plain(panel.title))


def _content(ax: Axes, panel: Panel) -> None:
    """Curves, axes and legend."""
    if panel.labels:
        _named(ax, panel)
    else:
        _curves(ax, panel)
    ax.set(xlabel=panel.x, ylabel=panel.y)


def _named(ax: Axes, panel: Panel) -> None:
    """Dots or horizontal bars with names, the first at the top."""
    (curve,) = panel.curves
    colour = COLOURS[curve.colour]
    if panel.form == "bars":
        ax.barh(curve.y, curve.x, color=colour, height=0.6)
    else:
        ax.plot(curve.x, curve.y, "o", color=colour, markersize=6)
        ax.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.8)
    ax.set_yticks(curve.y, [_short(name) for name in panel.labels], fontsize=8)
    ax.set_ylim(len(curve.y) - 0.4, -0.6)
    if panel.logarithmic:
        ax.set_xscale("log")
        ax.set_xlim(min(curve.x) / 2, max(curve.x) * 2)
        _plain_marks(ax.xaxis, max(curve.x) / min(curve.x))


def _curves(ax: Axes, panel: Panel) -> None:
    """Lines or outlines, and where they should lie."""
    if panel.ideal == "diagonal":
        ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=0)
    elif panel.ideal == "one":
        ax.axhline(1, color=FAINT, linewidth=1, zorder=0)
    for turn, curve in enumerate(panel.curves):
        colour, name = COLOURS[curve.colour % len(COLOURS)], _plain(curve.name)
        if panel.form == "outline":
            if curve.filled:
                ax.stairs(curve.y, curve.x, color=colour, fill=True, alpha=0.3, label=name)
            else:
                ax.stairs(curve.y, curve.x, color=colour, linewidth=1.4, label=name)
        else:
            mark = MARKS[turn % len(MARKS)] if panel.form == "points" else ""
            ax.plot(curve.x, curve.y, STROKES[turn % len(STROKES)], color=colour, marker=mark,
                    markersize=4, linewidth=1.4, label=name)  # fmt: skip
    if panel.logarithmic:
        ax.set_yscale("log")
        _plain_marks(ax.yaxis, math.inf)
    else:
        ax.set_ylim(bottom=0)
    if panel.title:
        ax.legend(loc="best")


def _plain_marks(axis: XAxis | YAxis, ratio: float) -> None:
    """Marks 0.1, 1, 10 on a logarithmic axis, with 2 and 5 between them over few decades."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _plain(name: str) -> str:
    """A name as it is: matplotlib reads $ as mathematics."""
    return name.replace("$", r"\$")


def _short(name: str) -> str:
    """A name with its middle left out where it is long."""
    if len(name) > LONGEST:
        half = (LONGEST - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return _plain(name)
