"""What a run measured, as tables and as JSON."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

import kfac_laplace
from kfac_laplace.demo.classification import Outcome
from kfac_laplace.demo.regression import RegressionOutcome
from kfac_laplace.states.files import write_text

if TYPE_CHECKING:
    from kfac_laplace.demo.findings import Findings

#: field, heading, format
CLASSIFICATION_COLUMNS = (
    ("accuracy", "accuracy", "{:.3f}"),
    ("nll", "NLL", "{:.3f}"),
    ("ece", "ECE", "{:.3f}"),
    ("brier", "Brier", "{:.3f}"),
    ("ood_auroc", "OOD entropy", "{:.3f}"),
    ("ood_score_auroc", "OOD score", "{:.3f}"),
    ("log_evidence", "log evidence", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("curvature_seconds", "curv. s", "{:.1f}"),
    ("training_runs", "runs", "{:.0f}"),
)
REGRESSION_COLUMNS = (
    ("rmse", "RMSE", "{:.3f}"),
    ("nll", "NLL", "{:.3f}"),
    ("coverage", "90 % coverage", "{:.3f}"),
    ("sigma", "σ", "{:.3f}"),
    ("log_evidence", "log evidence", "{:.0f}"),
    ("seconds", "seconds", "{:.1f}"),
)

Rows = Sequence[Outcome] | Sequence[RegressionOutcome]
Columns = tuple[tuple[str, str, str], ...]


def classification_table(model: str, outcomes: Sequence[Outcome]) -> Table:
    """Methods against measures on the test digits, mean ± standard error over seeds."""
    rows = [outcome for outcome in outcomes if outcome.model == model]
    return _table(f"Digits, {model}", rows, CLASSIFICATION_COLUMNS)


def regression_table(rows: Sequence[RegressionOutcome]) -> Table:
    """Methods against measures on the test patients, in standardised units."""
    return _table("Diabetes, MLP", rows, REGRESSION_COLUMNS)


def _table(title: str, rows: Rows, columns: Columns) -> Table:
    seeds = len({row.seed for row in rows})
    spread = f", mean ± standard error over {seeds} seeds" if seeds > 1 else ""
    table = Table(title=title + spread)
    table.add_column("method", no_wrap=True)
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        cells = [_cell([getattr(row, field) for row in mine], form) for field, _, form in columns]
        table.add_row(method, *cells)
    return table


def _cell(values: Sequence[float | None], form: str) -> str:
    """A value, or mean ± standard error of several; a dash where there is none."""
    known = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if not len(known):
        return "–"
    mean = form.format(known.mean().item())
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.format((known.std() / len(known) ** 0.5).item())}"


def write_json(findings: "Findings", path: Path) -> None:
    """Write all that was measured.

    The file holds "settings", "versions", "device", "threads", "seconds", and under
    "classification" and "regression" one object a row with the fields of `Outcome` and
    `RegressionOutcome`; under "history" the tuned runs of the first seed, round by round.
    """
    content = {
        "settings": asdict(findings.settings),
        "versions": {
            "kfac_laplace": kfac_laplace.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": findings.settings.device,
        "threads": torch.get_num_threads(),
        "seconds": findings.seconds,
        "classification": [asdict(outcome) for outcome in findings.outcomes],
        "regression": [asdict(row) for row in findings.regression],
        "history": _histories(findings),
    }
    write_text(json.dumps(content, indent=1, default=Tensor.tolist) + "\n", path)


def _histories(findings: "Findings") -> dict[str, list[dict[str, Any]]]:
    """Rounds of the tuned runs of the first seed, by network and method, without names."""
    return {
        f"{result.outcome.model}: {result.outcome.method}": [
            {name: value for name, value in asdict(record).items() if name != "groups"}
            for record in result.fit.tuner.history
        ]
        for result in findings.shown
        if result.fit.tuner is not None
    }
