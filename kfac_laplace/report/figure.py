"""Panels drawn by matplotlib: all in one figure, or each as SVG for a page.

Figures are made without pyplot, whose state belongs to the caller.
"""

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from kfac_laplace.report.panels import Panel

#: Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#1F2328", "#8C959F"
#: Longest name of a bar that is written out.
LONGEST = 26
WIDTH, HEIGHT = 4.6, 3.5

#: Colours of a drawing by the names that the page's style sheet has for them, in both themes.
VARIABLES = {
    **{colour.lower(): f"var(--c{turn})" for turn, colour in enumerate(COLOURS)},
    INK.lower(): "var(--ink)",
    FAINT.lower(): "var(--faint)",
}
STYLE = {
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
        figure.suptitle(head.replace("$", r"\$"), fontsize=9)
        cells = figure.subfigures(rows, 2, squeeze=False).flat
        for panel, cell in zip(panels, cells, strict=False):
            draw(cell, panel, title=True)
        return figure


def svg(panel: Panel, prefix: str) -> str:
    """A panel as an `<svg>` element, whose colours are the page's and whose ids begin alike."""
    size = (WIDTH, max(HEIGHT, 0.17 * len(panel.labels) + 0.8))
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
        ax.set_title(panel.title)


def _content(ax: Axes, panel: Panel) -> None:
    """Curves, axes and legend."""
    if panel.form == "bars":
        _bars(ax, panel)
    else:
        _curves(ax, panel)
    ax.set(xlabel=panel.x, ylabel=panel.y)


def _bars(ax: Axes, panel: Panel) -> None:
    """Horizontal bars, the first at the top."""
    (curve,) = panel.curves
    ax.barh(curve.y, curve.x, color=COLOURS[curve.colour], height=0.7)
    ax.set_yticks(curve.y, [_short(name) for name in panel.labels], fontsize=7.5)
    ax.invert_yaxis()
    if panel.logarithmic:
        ax.set_xscale("log")
        low, high = min(curve.x), max(curve.x)
        ax.set_xlim(low / 3, high * 2)  # a bar of the least value is to be seen


def _curves(ax: Axes, panel: Panel) -> None:
    """Lines or outlines, and where they should lie."""
    if panel.ideal == "diagonal":
        ax.plot([0, 1], [0, 1], color=FAINT, linewidth=1, zorder=0)
    elif panel.ideal == "one":
        ax.axhline(1, color=FAINT, linewidth=1, zorder=0)
    for curve in panel.curves:
        colour, style = COLOURS[curve.colour % len(COLOURS)], "--" if curve.dashed else "-"
        name = curve.name.replace("$", r"\$")
        if panel.form == "outline":
            ax.stairs(curve.y, curve.x, color=colour, linestyle=style, linewidth=1.4, label=name)
        else:
            mark = "o" if panel.form == "points" else ""
            ax.plot(curve.x, curve.y, style, color=colour, marker=mark, markersize=3.5,
                    linewidth=1.4, label=name)  # fmt: skip
    ax.set_ylim(bottom=0)
    if panel.title:
        ax.legend(loc="best")


def _short(name: str) -> str:
    """A name with its middle left out where it is long; matplotlib reads $ as mathematics."""
    if len(name) > LONGEST:
        half = (LONGEST - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return name.replace("$", r"\$")
