"""Rows of measurements as tables: in the terminal, in Markdown, and in docs/performance.md."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from rich.table import Table

from benchmarks.cases import CONTENDERS, FACTORS_ONLY, SUITES
from benchmarks.rounds import ROOT, Conditions, Row
from kfac_laplace.states.files import write_text

PAGE = ROOT / "docs" / "performance.md"
PACKAGES = ("kfac-laplace", "torch", "curvlinops-for-pytorch", "asdfghjkl",
            "backpack-for-pytorch", "laplace-torch")  # fmt: skip

Column = Callable[[Row, Row], str]


def number(field: str, form: str, factor: float = 1.0) -> Column:
    """A field of a row."""
    return lambda row, ours: format(row[field] * factor, form)


def against_ours(field: str) -> Column:
    """A field as a multiple of ours; a dash where ours has none."""
    return lambda row, ours: (
        format(row[field] / ours[field], ".3g") if ours.get(field, 0) > 0 else "–"
    )


#: Results of scripts of their own.
LISTS = ("profiles", "precision")

COMMON: dict[str, Column] = {
    "ms": number("seconds", ".4g", 1000),
    "training steps": number("ratio", ".3g"),
    "peak MiB": number("peak_mib", ".0f"),
    "time ÷ ours": against_ours("seconds"),
    "memory ÷ ours": against_ours("peak_mib"),
}
#: heading → cell; the heading "training steps" counts forward-backward passes of the same batch
COLUMNS: dict[str, dict[str, Column]] = {
    "fit": {**COMMON, "trace ÷ ours": against_ours("trace")},
    "evidence": {**COMMON, "decomposition ms": number("decomposition_seconds", ".4g", 1000)},
    "predict": COMMON,
    "online": {
        "tuned ÷ plain": COMMON["training steps"],
        **{name: COMMON[name] for name in COMMON if name != "training steps"},
    },
    "scaling": COMMON,
}
TITLES = {
    "fit": "One curvature pass over a batch",
    "evidence": "Decomposition and 100 hyper-steps after a fit",
    "predict": "GLM predictive, probit",
    "online": "Five epochs with one round of tuning",
    "scaling": "Exact passes along one axis at a time",
}


def head(suite: str) -> list[str]:
    """Headings of a suite's table."""
    return ["case", "contender", *COLUMNS[suite]]


def lines(suite: str, rows: Sequence[Row]) -> Iterator[list[str]]:
    """The cells of each row; what gave no number says why in the first column of numbers."""
    by_case = {(row["title"], row["contender"]): row for row in rows}
    before = ""
    for row in rows:
        title = row["title"]
        reference = "ours" if row["contender"] in FACTORS_ONLY else "ours-laplace"
        ours = by_case.get((title, reference), {})
        if row["status"] == "ok":
            cells = [cell(row, ours) for cell in COLUMNS[suite].values()]
        else:
            reason = shorten(row["status"].replace("|", "/"), 72, placeholder=" …")
            cells = [reason, *["–"] * (len(COLUMNS[suite]) - 1)]
        yield ["" if title == before else title, row["contender"], *cells]
        before = title


def rich_table(suite: str, rows: Sequence[Row]) -> Table:
    """For the terminal."""
    table = Table(title=TITLES[suite])
    for name in head(suite):
        table.add_column(name, justify="left" if name in ("case", "contender") else "right")
    for cells in lines(suite, rows):
        table.add_row(*cells)
    return table


def markdown(suite: str, rows: Sequence[Row]) -> str:
    """For a page."""
    titles = head(suite)
    rules = ["---", "---", *["---:"] * (len(titles) - 2)]
    made = [f"| {' | '.join(cells)} |" for cells in (titles, rules, *lines(suite, rows))]
    return "\n".join(made).replace("|  |", "| |")


def write_json(path: Path, rows: Sequence[Row], sizes: str, conditions: Conditions) -> None:
    """Write all that was measured, and under which conditions."""
    content = {
        "sizes": sizes,
        "conditions": asdict(conditions),
        "machine": device_name(conditions.device),
        "versions": {"python": platform.python_version(), **versions()},
        "rows": list(rows),
    }
    write_text(json.dumps(content, indent=1) + "\n", path)


def read_rows(path: Path, conditions: Conditions) -> list[Row]:
    """The rows of an earlier run, or `SystemExit` if it was made under other conditions."""
    content = json.loads(path.read_text(encoding="utf-8"))
    now = [conditions.device, conditions.threads, versions(), device_name(conditions.device)]
    made = content["conditions"]
    others = {name: v for name, v in content["versions"].items() if name != "python"}
    if [made["device"], made["threads"], others, content["machine"]] != now:
        raise SystemExit(f"{path}: made under other conditions, which --keep would mix")
    return list(content["rows"])


def joined(before: Sequence[Row], rows: Sequence[Row], titles: Sequence[str]) -> list[Row]:
    """Rows of two runs, the later ones where both have them, in the order of cases."""
    found = {(row["title"], row["contender"]): row for row in (*before, *rows)}
    order = {title: place for place, title in enumerate(titles)}
    contenders = list(CONTENDERS)
    return sorted(
        found.values(),
        key=lambda row: (order.get(row["title"], len(order)), contenders.index(row["contender"])),
    )


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """What was measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability() + f" {platform.machine()}"


def write_page(results: Path, page: Path = PAGE) -> list[str]:
    """Write the tables of a page anew from the JSON files that exist; returns their suites.

    A table lies between `<!-- table: NAME -->` and `<!-- end of table -->`.
    """
    text, written = page.read_text(encoding="utf-8"), []
    for suite in SUITES:
        path = results / f"{suite}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        text = put(text, suite, f"{under(content)}\n\n{markdown(suite, content['rows'])}")
        written.append(suite)
    for name in LISTS:
        path = results / f"{name}.json"
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            units = dict.fromkeys(list(row)[1] for row in rows)  # a table for each
            parts = [[row for row in rows if list(row)[1] == unit] for unit in units]
            text = put(text, name, "\n\n".join(list_table(part) for part in parts))
            written.append(name)
    write_text(text, page)
    return written


def put(text: str, name: str, table: str) -> str:
    """A page with a table between its marks."""
    begin, end = f"<!-- table: {name} -->\n", "<!-- end of table -->"
    start = text.index(begin) + len(begin)
    return text[:start] + table + "\n" + text[text.index(end, start) :]


def list_table(rows: Sequence[Row]) -> str:
    """Rows of the scripts that write plain lists, each of its fields a column."""
    titles = list(dict.fromkeys(name for row in rows for name in row))
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [[plain(row.get(name, "–")) for name in titles] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: Any) -> str:
    """A cell."""
    return format(value, ".3g") if isinstance(value, float) else str(value)


def under(content: dict[str, Any]) -> str:
    """The conditions of a run, in a sentence."""
    made = content["conditions"]
    packages = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    threads, rounds = (
        f"{made[name]} {unit}{'s' * (made[name] > 1)}"
        for name, unit in (("threads", "thread"), ("repeats", "round"))
    )
    return (
        f"Sizes “{content['sizes']}”, {made['device']} ({content['machine']}), {threads}, "
        f"medians over {rounds}; {packages}."
    )
