"""Contenders in turn, each measurement a process of its own, and medians over the rounds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Conditions:
    """How measurements are made.

    Args:
        device: "cpu" or "cuda".
        threads: of torch and its libraries.
        repeats: rounds over the contenders, each a process.
        timeout: seconds after which a process is ended.
        memory_gib: what a task may take on top of the process.
        seconds: time for the runs of one process after the first.
    """

    device: str = "cpu"
    threads: int = 1
    repeats: int = 3
    timeout: float = 600
    memory_gib: float = 8
    seconds: float = 10


def run_case(
    case: Case, contenders: Sequence[str], conditions: Conditions, tell: Callable[[str], None]
) -> list[Row]:
    """One row for each contender; rounds go over the contenders, which drifts of the machine meet.

    A contender that failed is not asked again.
    """
    results: dict[str, list[Row]] = {contender: [] for contender in contenders}
    for number in range(conditions.repeats):
        for contender, mine in results.items():
            if mine and mine[-1]["status"] != "ok":
                continue
            tell(f"{case.suite}: {case.title}: {contender}, round {number + 1}")
            mine.append(ask(case, contender, conditions))
    return [
        {**case.plain(), "title": case.title, "contender": contender, **summary(mine)}
        for contender, mine in results.items()
    ]


def ask(case: Case, contender: str, conditions: Conditions) -> Row:
    """One measurement in a new process."""
    request = {
        "case": case.plain(),
        "contender": contender,
        "device": conditions.device,
        "threads": conditions.threads,
        "memory_gib": conditions.memory_gib,
        "seconds": conditions.seconds,
    }
    threads = {f"{name}_NUM_THREADS": str(conditions.threads) for name in ("OMP", "MKL")}
    command = [sys.executable, "-m", "benchmarks.measure", json.dumps(request)]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **threads},
            capture_output=True,
            text=True,
            timeout=conditions.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": f"not done after {conditions.timeout:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "bad_alloc" in done.stderr:
            return {"status": "out of memory"}
        return {"status": f"failed: exit code {done.returncode}: {last}"[:200]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def summary(results: Sequence[Row]) -> Row:
    """Medians of what was measured, or the status of the one that failed.

    "ratio" is the median of the ratios to a training step of the same process.
    """
    for result in results:
        if result["status"] != "ok":
            return {"status": result["status"]}
    numbers = {name: [r[name] for r in results] for name in results[0] if name != "status"}
    row: Row = {"status": "ok", **{name: median(values) for name, values in numbers.items()}}
    row["ratio"] = median(r["seconds"] / r["step_seconds"] for r in results)
    row["seconds_by_round"] = numbers["seconds"]
    return row
