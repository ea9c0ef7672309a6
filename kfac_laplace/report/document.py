"""`Report`: what was measured, as text, plain data, pictures and a page."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfac_laplace.errors import InvalidValue, MissingPackage
from kfac_laplace.report import page
from kfac_laplace.report.bootstrap import Bootstrap, Difference, Interval
from kfac_laplace.report.panels import Panel
from kfac_laplace.report.tables import Row, as_html, as_html_by_row, as_text
from kfac_laplace.states.files import write_text
from kfac_laplace.summary import Line

if TYPE_CHECKING:
    from types import ModuleType

    from kfac_laplace.report.figure import Figure

PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Report:
    """Scores by way of predicting; `print` shows a table, notebooks another.

    Args:
        table: a row for each way, the mode first.
        told: how strange inputs are told, a row for each way and score; empty without any.
        n: number of examples.
        n_strange: number of strange inputs.
        bootstrap: the resamples that intervals come from.
        head: the posterior in a line.
        layers: its groups.
        panels: what the pictures show.
    """

    table: list[Row]
    told: list[Row] = field(default_factory=list)
    n: int = 0
    n_strange: int = 0
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    head: str = ""
    layers: tuple[Line, ...] = ()
    panels: list[Panel] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For each way its name under "prediction", and its scores by name."""
        return [{"prediction": row.name, **row.values} for row in self.table]

    @property
    def intervals(self) -> list[dict[str, Interval]]:
        """For each way the ends of the scores' intervals; empty for a single example."""
        return [row.intervals for row in self.table]

    @property
    def differences(self) -> list[dict[str, Difference]]:
        """For each way its scores minus the mode's on the same resamples, with both ends."""
        return [row.differences for row in self.table]

    @property
    def ood(self) -> list[dict[str, Any]]:
        """AUROC and FPR95 of each score that tells strange inputs, its name under "score"."""
        return [{"score": row.name, **row.values} for row in self.told]

    @property
    def _said(self) -> str:
        """How much data, and what the intervals are."""
        said = f"{self.n} examples"
        if self.n_strange:
            said += f", {self.n_strange} strange inputs"
        return said

    @property
    def _intervals_said(self) -> str:
        """What the intervals are; empty without any."""
        if not any(self.intervals):
            return ""
        level, resamples = 100 * self.bootstrap.level, self.bootstrap.resamples
        return f"{level:g} % intervals from {resamples} resamples of the examples"

    @property
    def _verdicts_said(self) -> str:
        """What the page says of the columns, as HTML."""
        said = "mode: the network alone (MAP)."
        if any(self.differences):
            said += (
                f" better, worse: than the mode, where the {100 * self.bootstrap.level:g} % "
                "interval of the difference on the same resamples leaves out 0."
            )
        return f'<p class="soft">{said}</p>'

    def __str__(self) -> str:
        """Aligned columns, one line for each way to predict."""
        blocks = [self._said, *as_text(self.table, self._intervals_said)]
        if self.told:
            blocks += ["", *as_text(self.told, "", "strange inputs by")]
        return "\n".join(blocks)

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        parts = [f"<div><strong>{self._said}</strong>", as_html(self.table)]
        if self.told:
            parts.append(as_html_by_row(self.told))
        return "".join([*parts, f"<small>{self._intervals_said}</small></div>"])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data that JSON can hold: numbers that are not finite are None."""
        content = {
            "n": self.n,
            "n_strange": self.n_strange,
            "posterior": self.head,
            "bootstrap": asdict(self.bootstrap),
            "rows": self.rows,
            "intervals": self.intervals,
            "differences": self.differences,
            "ood": self.ood,
            "ood_intervals": [row.intervals for row in self.told],
            "layers": [asdict(layer) for layer in self.layers],
            "panels": [asdict(panel) for panel in self.panels],
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def figure(self) -> "Figure":
        """All pictures in one matplotlib figure, of which pyplot knows nothing.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        figure: Figure = _drawing().overview(self.panels, self.head)
        return figure

    def html(self) -> str:
        """One page with the tables and pictures inside; it fetches nothing.

        Raises:
            MissingPackage: matplotlib is not installed.
        """
        drawn: Callable[[Panel, str], str] = _drawing().svg
        pictures = [(panel, drawn(panel, f"p{turn}")) for turn, panel in enumerate(self.panels)]
        tables = [("Scores", as_html(self.table) + self._verdicts_said)]
        if self.told:
            tables.append(("Strange inputs, told by", as_html_by_row(self.told)))
        return page.html(
            self.head, [self._said, self._intervals_said], tables, pictures, self.layers
        )

    def save(self, path: str | Path) -> None:
        """Write the report in the form that the suffix says.

        Args:
            path: .json for the numbers, .html for the page, .png, .pdf or .svg for the figure.

        Raises:
            InvalidValue: another suffix.
            MissingPackage: matplotlib is not installed, for all but .json.
            OSError: the folder does not exist or is not writable.
        """
        path = Path(path)
        kind = check_suffix(path)
        if kind in PICTURES:
            self.figure().savefig(path, dpi=120)
        elif kind == ".html":
            write_text(self.html(), path)
        else:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            write_text(text + "\n", path)


def check_suffix(path: str | Path) -> str:
    """The suffix in lower case, or `InvalidValue` unless reports can be written so."""
    kind = Path(path).suffix.lower()
    if kind not in (*PICTURES, ".json", ".html"):
        raise InvalidValue(
            "the suffix says in which form a report is written",
            where="path",
            got=repr(str(path)),
            remedy="End it in .json, .html, .png, .pdf or .svg",
        )
    return kind


def _drawing() -> "ModuleType":
    """The module that draws."""
    try:
        from kfac_laplace.report import figure
    except ImportError as error:
        raise MissingPackage(
            "pictures are drawn by matplotlib, which cannot be imported",
            where="report",
            got=error,
            remedy='Install it: pip install "kfac-laplace[report]". Numbers need no package: '
            "print the report, or save it as .json",
        ) from error
    return figure


def _plain(value: Any) -> Any:
    """Lists, dictionaries, text and finite numbers."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
