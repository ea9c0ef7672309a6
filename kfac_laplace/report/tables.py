"""Rows of scores as text and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from kfac_laplace.report.bootstrap import Difference, Interval
from kfac_laplace.summary import aligned

#: Scores in the order in which they are told, by their names in tables.
NAMES = {
    "accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "aurc": "AURC",
    "confidence": "confidence", "rmse": "RMSE", "crps": "CRPS", "coverage_50": "in 50 %",
    "coverage_90": "in 90 %", "coverage_95": "in 95 %", "sharpness": "width 90 %", "sigma": "σ",
    "auroc": "OOD AUROC", "fpr95": "OOD FPR95",
}  # fmt: skip
#: What they mean, for those who read the page.
MEANINGS = {
    "accuracy": "share of right predictions", "nll": "mean negative log probability (nats)",
    "ece": "mean gap between accuracy and confidence, 15 bins",
    "brier": "squared distance to the one-hot label",
    "aurc": "error rate averaged over how many are answered, surest first",
    "confidence": "mean probability of the predicted class", "rmse": "root mean squared error",
    "crps": "mean CRPS, in the units of the targets",
    "coverage_50": "share of targets in 50 % intervals",
    "coverage_90": "share of targets in 90 % intervals",
    "coverage_95": "share of targets in 95 % intervals",
    "sharpness": "mean width of 90 % intervals", "sigma": "observation noise",
    "auroc": "chance that a strange input scores above a test input",
    "fpr95": "share of strange inputs that pass where 95 % of test inputs do",
}  # fmt: skip
HIGHER, LOWER = ("accuracy", "auroc"), ("nll", "ece", "brier", "aurc", "rmse", "crps", "fpr95")


@dataclass(frozen=True)
class Row:
    """Figures of one way to predict, or of one score.

    Args:
        name: of the way.
        values: figures by name.
        intervals: ends of their intervals.
        differences: figures minus those of the mode on the same resamples, with both ends.
        short: its name where there is no room.
    """

    name: str
    values: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    short: str = ""

    def verdict(self, name: str) -> str:
        """Whether it is better or worse than the mode, where the interval says so; else nothing."""
        if name not in self.differences or name not in HIGHER + LOWER:
            return ""
        _, low, high = self.differences[name]
        if low <= 0 <= high:
            return ""
        return "better" if (low > 0) == (name in HIGHER) else "worse"


def named(rows: Sequence[Row]) -> list[str]:
    """The figures that some row has, in order."""
    return [name for name in NAMES if any(name in row.values for row in rows)]


def as_text(rows: Sequence[Row], said: str, heading: str = "prediction") -> list[str]:
    """Lines of values; then of intervals, and what is better or worse than the mode.

    Args:
        rows: of one table.
        said: what the intervals are; empty for none.
        heading: of the first column.
    """
    names = named(rows)
    head = [heading, *(NAMES[name] for name in names)]
    values = [[row.name, *(_number(row.values.get(name)) for name in names)] for row in rows]
    if not said:
        return aligned([head, *values])
    ends = [[row.name, *(_ends(row.intervals.get(name)) for name in names)] for row in rows]
    found = [*aligned([head, *values]), "", said, *aligned([head, *ends]), ""]
    for row in rows[1:]:
        told = {name: row.verdict(name) for name in names}
        parts = [
            f"{kind} in {', '.join(NAMES[name] for name in names if told[name] == kind)}"
            for kind in ("better", "worse")
            if kind in told.values()
        ]
        found.append(f"{row.name}: {'; '.join(parts) or 'no difference told'} (to the mode)")
    return found


def as_html(rows: Sequence[Row]) -> str:
    """A table with a line for each figure and a column for each row; names are escaped."""
    head = "".join(f'<th scope="col">{_names(row)}</th>' for row in rows)
    body = [
        f'<tr><th scope="row">{_explained(name)}</th>'
        + "".join(f"<td>{_cell(row, name)}</td>" for row in rows)
        for name in named(rows)
    ]
    return _table(f"<td></td>{head}", body)


def as_html_by_row(rows: Sequence[Row]) -> str:
    """A table with a line for each row and a column for each figure; names are escaped."""
    names = named(rows)
    head = "".join(f'<th scope="col">{_explained(name)}</th>' for name in names)
    body = [
        f'<tr><th scope="row">{html.escape(row.name)}</th>'
        + "".join(f"<td>{_cell(row, name)}</td>" for name in names)
        for row in rows
    ]
    return _table(f"<td></td>{head}", body)


def _table(head: str, body: Sequence[str]) -> str:
    lines = "".join(f"{line}</tr>" for line in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _names(row: Row) -> str:
    """A name, and the short one for phones, which style sheets show in turn."""
    name = html.escape(row.name)
    if not row.short:
        return name
    short = html.escape(row.short)
    return f'<span class="long">{name}</span><span class="short" hidden>{short}</span>'


def _explained(name: str) -> str:
    """A figure's name and what it means."""
    return (
        f'{html.escape(NAMES[name])}<br><small class="note">{html.escape(MEANINGS[name])}</small>'
    )


def _cell(row: Row, name: str) -> str:
    """A value over its interval, with what is to be said of its difference."""
    cell = _number(row.values.get(name))
    if name in row.intervals:
        cell += f"<br><small>{_ends(row.intervals[name])}</small>"
    verdict = row.verdict(name)
    return cell + (f'<br><small class="{verdict}">{verdict}</small>' if verdict else "")


def _number(value: float | None) -> str:
    """Four places, or four digits of what is large."""
    if value is None:
        return "–"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def _ends(ends: Interval | None) -> str:
    """Both ends, shorter than values."""
    if ends is None:
        return "–"
    return " to ".join(f"{end:.3f}" if abs(end) < 100 else f"{end:.4g}" for end in ends)
