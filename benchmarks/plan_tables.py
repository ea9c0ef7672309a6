"""The tables of docs/scale.md, from the results of `plans` and `scale`: prints them as Markdown.

python -m benchmarks.plan_tables
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfac_laplace.planning.plan import duration, size

RESULTS = Path(__file__).parent / "results"
MIB = 1024**2
NAMES = {
    "mlp": "perceptron 784-512-512-10",
    "resnet18": "ResNet-18 with batch norm, 32×32",
    "vit": "transformer, 3 blocks of 192, 65 tokens",
    "lstm": "LSTM of 192 units, 32 tokens",
    "wide": "regression 64-1536-1536-3",
}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_plans() -> str:
    """Plans beside fits."""
    rows: list[list[str]] = []
    for row in json.loads((RESULTS / "plans.json").read_text()):
        low, high = row["ratio_range"]
        structure = row.get("hessian_structure", "kron")
        fisher = row.get("fisher", "exact")
        rows.append(
            [
                NAMES[row["case"]],
                f"{structure}, {fisher}",
                f"{row['seconds']:.2f} s",
                f"**{row['ratio']:.2f}** ({low:.2f} … {high:.2f})",
                f"{row['planned_mib']:.0f} MiB",
                f"**{row['tensors_ratio']:.2f}**",
                f"{row['resident_mib']:.0f} MiB",
                f"{row['resident_ratio']:.2f}",
                f"{row['planned_mib'] / row['returned_mib']:.2f}",
                f"{row['planned_factors_mib'] / row['factors_mib']:.3f}",
            ]
        )
    headings = [
        "network", "structure, vectors", "fit took", "time, plan/fit", "peak planned",
        "plan/tensors", "resident peak", "plan/resident", "… all returned", "factors, plan/fit",
    ]  # fmt: skip
    return markdown(headings, rows)


def of_large() -> str:
    """Large networks."""
    rows: list[list[str]] = []
    for row in _scale()["large"]:
        rows.append(
            [
                row["network"],
                f"{row['structure']}, {row['fisher']}",
                f"{row['random_parameters'] / 1e6:.1f} M",
                f"{row['n_data']:,} in batches of {row['batch']}",
                f"{row['vectors']:,}",
                f"{row['operations']:.2g}",
                size(row["peak"]),
                size(row["factors"]),
                size(row["decompositions"]),
                size(row["bases"]),
                f"{row['later_operations']:.2g}",
                duration(86400 * row["days_here"]),
                duration(86400 * row["days_accelerator"]),
            ]
        )
    headings = [
        "network", "structure, vectors", "random", "data", "vectors a batch", "operations", "peak",
        "factors", "log-determinants", "predictions", "operations of these", "here", "accelerator",
    ]  # fmt: skip
    return markdown(headings, rows)


def rates() -> str:
    """Of this machine and of the accelerator."""
    row = _scale()["large"][0]
    return f"{row['rate_here']:.2g} and {row['rate_accelerator']:.0e}"


def of_curves() -> str:
    """Curves."""
    rows: list[list[str]] = []
    for row in _scale()["curves"]:
        rows.append(
            [
                row["varied"],
                str(row["value"]),
                str(row["vectors"]),
                f"{row['operations']:.2g}",
                f"{row['seconds']:.3g} s",
                f"{row['planned_seconds'] / row['seconds']:.2f}",
                f"{row['planned_peak_mib']:.3g} MiB",
                f"{row['factors_mib']:.3g} MiB",
                f"{row['decompositions_mib']:.2g} MiB",
                f"{row['bases_mib']:.2g} MiB",
            ]
        )
    headings = [
        "varied", "value", "vectors", "operations", "fit took", "plan/fit", "peak", "factors",
        "log-determinants", "predictions",
    ]  # fmt: skip
    return markdown(headings, rows)


def _scale() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "scale.json").read_text())
    return found


def tables() -> list[str]:
    """All of them, in the order of the page."""
    return [of_plans(), of_large(), of_curves()]


if __name__ == "__main__":
    print("\n\n".join([*tables(), rates()]))
