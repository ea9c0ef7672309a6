"""The tables of docs/architectures.md, made from fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from architectures.kind import Kind
from architectures.kinds import KINDS
from architectures.verdict import verdicts
from zoo.fitting import BUILDERS, fit

from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout, Segments

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEADS = {
    "layers": ("layer", "parameters", "block", "equals the exact GGN block"),
    "networks": ("network", "Kronecker", "dense", "diagonal", "by example", "frozen", "rows on"),
}

Rows = list[tuple[str, ...]]


def layer_rows(kind: Kind) -> Rows:
    """A layer with a row for each treatment of its parameters."""
    return [
        (kind.name if k == 0 else "", _names(verdict.params), verdict.treatment, verdict.exactness)
        for k, verdict in enumerate(verdicts(kind))
    ]


def _names(params: Iterable[str]) -> str:
    """Names in code; a weight with its bias by the name of their module."""
    text = ", ".join(f"`{name}`" for name in params)
    return re.sub(r"`([^`]+)\.weight`, `\1\.bias`", r"`\1`", text)


def network_rows(name: str) -> Rows:
    """A network of the zoo: its parameters by treatment, and its uses of them by layout."""
    curvature = fit(name).curvature
    sizes = {name: p.numel() for name, p in curvature.network.model.named_parameters()}
    counts: Counter[str] = Counter()
    for parameter, kind in curvature.coverage.items():
        counts[kind] += sizes[parameter]
    generic = sum(group.layout.size for group in curvature.groups if group.role == "generic")
    layouts = Counter(
        _place(row_layout) for row_layout in curvature.ggn.knowledge.row_layouts.values()
    )
    places = ", ".join(f"{place} ({uses})" for place, uses in layouts.most_common())
    kinds = [counts["kron"], counts["dense"], counts["diag"] - generic, generic, counts["frozen"]]
    return [(name, *map(str, kinds), places)]


def _place(row_layout: RowLayout | None) -> str:
    """Where the examples lie among the rows of a layer."""
    if isinstance(row_layout, Segments):
        return row_layout.kind
    assert isinstance(row_layout, Axis)
    return ("first axis", "second axis", "third axis")[row_layout.axis]


def all_rows(table: str) -> Rows:
    """All rows of a table."""
    if table == "layers":
        return [row for kind in KINDS for row in layer_rows(kind)]
    return [row for name in BUILDERS for row in network_rows(name)]


def as_lines(rows: Rows) -> list[str]:
    """Rows in Markdown."""
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]


def _span(text: str, table: str) -> tuple[int, int]:
    """Where a table lies in the page: between its markers."""
    begin, end = f"<!-- table: {table} -->\n", "<!-- end of table -->"
    start = text.index(begin) + len(begin)
    return start, text.index(end, start)


def committed(table: str) -> dict[str, list[str]]:
    """The lines of a table in the page, by what its first column names."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = _span(text, table)
    found: dict[str, list[str]] = {}
    for line in text[start:end].splitlines()[2:]:
        name = line[2:].partition(" | ")[0]
        if not line.startswith("| |"):
            found[name] = []
        found[[*found][-1]].append(line)
    return found


def write(table: str) -> None:
    """Make a table anew in the page."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = _span(text, table)
    head = HEADS[table]
    lines = as_lines([head, ("---",) * len(head), *all_rows(table)])
    PAGE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:], encoding="utf-8")
