"""Markdown tables of finished cells."""

from collections.abc import Mapping, Sequence

from benchmarks.experiments.lines import Line
from benchmarks.experiments.statistics import (
    Measure,
    difference,
    grouped,
    mean_of,
    together,
)

NOTHING = "–"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def methods_of(lines: Sequence[Line]) -> list[str]:
    """Methods in the order of their first line."""
    return list(dict.fromkeys(str(line.cell["method"]) for line in lines))


def means(lines: Sequence[Line], names: Sequence[str], columns: Mapping[str, Measure]) -> str:
    """Mean ± standard error over seeds, a row for each method in each group of cells.

    Args:
        lines: finished cells.
        names: entries of cells that make groups, "method" not among them.
        columns: measures by heading; one ends with its format after a colon, as in "NLL:.3f".
    """
    rows = []
    for group, those in grouped(lines, [*names, "method"]).items():
        cells = []
        for heading, measure in columns.items():
            found = mean_of(those, measure)
            form = heading.partition(":")[2] or ".3f"
            cells.append(found.text(form) if found else NOTHING)
        rows.append([*map(str, group), str(len(those)), *cells])
    headings = [heading.partition(":")[0] for heading in columns]
    # one group after another, methods in one order
    order = {method: place for place, method in enumerate(methods_of(lines))}
    first = {row: place for place, row in enumerate(grouped(lines, names))}
    texts = {tuple(map(str, row)): place for row, place in first.items()}
    rows.sort(key=lambda row: (texts[tuple(row[: len(names)])], order[row[len(names)]]))
    return markdown([*names, "method", "n", *headings], rows)


def differences(
    lines: Sequence[Line], names: Sequence[str], measure: Measure, baseline: str, seed: str = "seed"
) -> str:
    """Paired differences to a baseline: a row for each group of cells, a column for each method.

    In bold where a loss is larger by more than 0.02 beyond its standard error.
    """
    methods = [method for method in methods_of(lines) if method != baseline]
    rows = []
    for group, those in grouped(lines, names).items():
        found = [difference(those, measure, method, baseline, seed) for method in methods]
        if any(found):
            texts = [
                NOTHING if one is None else f"**{text}**" if one.worse else text
                for one, text in ((one, one.text("+.3f") if one else "") for one in found)
            ]
            rows.append([*map(str, group), *texts])
    return markdown([*names, *methods], rows)


def summary(
    lines: Sequence[Line],
    names: Sequence[str],
    measure: Measure,
    baselines: Sequence[str],
    seed: str = "seed",
) -> str:
    """For each method: mean difference to each baseline over groups of cells, and how many lose.

    A group is lost where the difference is above 0.02 by more than its standard error.
    """
    rows = []
    for method in methods_of(lines):
        texts = []
        for baseline in baselines:
            found = [
                difference(those, measure, method, baseline, seed)
                for those in grouped(lines, names).values()
            ]
            known = [one for one in found if one]
            whole = None if method == baseline else together(known)
            lost = sum(one.worse for one in known)
            texts += (
                [NOTHING] * 2
                if whole is None
                else [
                    whole.text("+.3f"),
                    f"{lost} of {len(known)}",
                ]
            )
        rows.append([method, *texts])
    headings = [text for name in baselines for text in (f"− {name}", "worse")]
    return markdown(["method", *headings], rows)
