"""The whole demo: both halves, their tables, their pictures and the JSON beside them."""

import time
from pathlib import Path

from rich.console import Console

from kfac_laplace.demo import pictures, report
from kfac_laplace.demo.classification import classification
from kfac_laplace.demo.findings import Findings
from kfac_laplace.demo.regression import bmi_band, regression
from kfac_laplace.demo.settings import Settings


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
