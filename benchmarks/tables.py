"""Turn a demo's results.json into the Markdown tables of docs/results.md.

python -m benchmarks.tables benchmarks/results/demo.json
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

CLASSIFICATION = {
    "accuracy": ".3f",
    "nll": ".3f",
    "ece": ".3f",
    "brier": ".3f",
    "ood_auroc": ".3f",
    "ood_score_auroc": ".3f",
    "log_evidence": ".0f",
    "seconds": ".1f",
    "curvature_seconds": ".1f",
    "training_runs": ".0f",
}
REGRESSION = {
    "rmse": ".3f",
    "nll": ".3f",
    "coverage": ".3f",
    "sigma": ".3f",
    "log_evidence": ".0f",
    "seconds": ".1f",
}


def main() -> None:
    """Print one table for each network and one for the regression half."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    content = json.loads(parser.parse_args().results.read_text())
    for model in content["settings"]["models"]:
        rows = [row for row in content["classification"] if row["model"] == model]
        print(f"### Digits, {model}\n\n{table(rows, CLASSIFICATION)}\n")
    print(f"### Diabetes, MLP\n\n{table(content['regression'], REGRESSION)}")


def table(rows: list[dict[str, object]], columns: dict[str, str]) -> str:
    """Methods against measures, mean ± standard error over seeds."""
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [cell([row[name] for row in mine], form) for name, form in columns.items()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[object], form: str) -> str:
    """Mean ± standard error; a dash where nothing was measured."""
    known = [float(value) for value in values if value is not None]  # type: ignore[arg-type]
    if not known:
        return "–"
    spread = stdev(known) / len(known) ** 0.5 if len(known) > 1 else 0.0
    return format(mean(known), form) + (f" ± {format(spread, form)}" if spread else "")


if __name__ == "__main__":
    main()
