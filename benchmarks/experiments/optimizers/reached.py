"""Targets, and when they were reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import fmean, median

from benchmarks.experiments.lines import Line
from benchmarks.experiments.optimizers.plan import FULL
from benchmarks.experiments.optimizers.training import scores


@dataclass(frozen=True)
class Arrival:
    """When the runs of one method and horizon first had a score of at least the target.

    Args:
        steps: median over seeds; infinite where half of them or more never had it.
        seconds: of training up to there, likewise.
        reached: seeds that had it.
        count: seeds.
    """

    steps: float
    seconds: float
    reached: int
    count: int


def target_of(finals: Sequence[Line], first_order: Sequence[str]) -> tuple[str, float] | None:
    """The first-order method with the best mean score at the full horizon, and its lowest score.

    None without such a method all of whose seeds have a score.
    """
    known: dict[str, list[float]] = {}
    for name in first_order:
        found = [line.found["score"] for line in of(finals, name, FULL)]
        if found and None not in found:
            known[name] = found
    if not known:
        return None
    best = max(known, key=lambda name: fmean(known[name]))
    return best, min(known[best])


def of(lines: Sequence[Line], method: str, horizon: float) -> list[Line]:
    """The lines of one method and horizon."""
    return [
        line for line in lines if line.cell["method"] == method and line.cell["horizon"] == horizon
    ]


def arrival(lines: Sequence[Line], measure: str, target: float) -> Arrival | None:
    """Medians of steps and seconds to a target over the seeds of one method and horizon."""
    if not lines:
        return None
    points = [first(line, measure, target) for line in lines]
    steps, seconds = zip(*points, strict=True)
    reached = sum(one < inf for one in steps)
    return Arrival(median(steps), median(seconds), reached, len(lines))


def first(line: Line, measure: str, target: float) -> tuple[float, float]:
    """Steps and seconds of the first evaluation at or above a target; infinite without one."""
    curve = line.found["curve"]
    times = curve[clock_of(line)]
    for step, time, score in zip(curve["step"], times, scores(curve, measure), strict=True):
        if score >= target:
            return step, time
    return inf, inf


def clock_of(line: Line) -> str:
    """Processor time says more on a shared machine; on an accelerator the clock does."""
    return "seconds" if line.found["device"] == "cpu" else "wall_seconds"


def horizon_on_first_seed(
    lines: Sequence[Line], method: str, best: Mapping[str, Line], measure: str, goal: float
) -> float:
    """The horizon of a method that takes the fewest steps to a goal on seed 0.

    The full one where none leads there.

    Args:
        lines: of the phase "schedule".
        method: its name.
        best: by method, the line of its best trial, whose horizon is the full one.
        measure: of the task.
        goal: a score on the examples to validate on.
    """
    runs = [line for line in [best[method], *lines] if line.cell["method"] == method]
    # of horizons that take as many steps the longer one
    found = sorted(runs, key=lambda line: -line.cell["horizon"])
    fastest = min(found, key=lambda line: first(line, measure, goal)[0])
    return float(fastest.cell["horizon"])
