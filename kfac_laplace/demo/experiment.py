"""The whole demo: both halves, their tables, their pictures and the JSON beside them."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kfac_laplace.demo import pictures, report
from kfac_laplace.demo.classification import Outcome, Result, classification
from kfac_laplace.demo.regression import Band, RegressionOutcome, bmi_band, regression
from kfac_laplace.demo.settings import Settings


@dataclass(frozen=True)
class Findings:
    """All that a run measured.

    Attributes:
        settings: what was run.
        outcomes: rows of the classification half.
        shown: results of the first seed, with their probabilities and fits, for the pictures.
        regression: rows of the regression half.
        band: the predictive band over body-mass index.
        seconds: wall-clock time of the run.
    """

    settings: Settings
    outcomes: list[Outcome]
    shown: list[Result]
    regression: list[RegressionOutcome]
    band: Band
    seconds: float


def run(settings: Settings, output: Path, console: Console) -> Findings:
    """Run the demo, print its tables and write its files into a folder.

    Args:
        settings: what to run.
        output: folder for the pictures and `results.json`; made if it is missing.
        console: where the tables go.
    """
    start = time.perf_counter()
    outcomes, shown = [], []
    for result in classification(settings):
        outcomes.append(result.outcome)
        if result.outcome.seed == settings.seed:
            shown.append(result)
    patients = list(regression(settings))
    band = bmi_band(settings)
    seconds = time.perf_counter() - start
    findings = Findings(settings, outcomes, shown, patients, band, seconds)
    for model in settings.models:
        console.print(report.classification_table(model, outcomes))
    console.print(report.regression_table(patients))
    output.mkdir(parents=True, exist_ok=True)
    report.write_json(findings, output / "results.json")
    pictures.write(findings, output)
    console.print(f"{seconds:.0f} s; pictures and results.json are in {output}/")
    return findings
