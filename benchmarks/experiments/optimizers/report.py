"""Tables and curves of finished cells."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.experiments.figures import curves
from benchmarks.experiments.lines import Line
from benchmarks.experiments.optimizers import __doc__ as PROTOCOL
from benchmarks.experiments.optimizers.methods import METHODS
from benchmarks.experiments.optimizers.plan import FULL, HORIZONS
from benchmarks.experiments.optimizers.reached import (
    Arrival,
    arrival,
    clock_of,
    horizon_on_first_seed,
    of,
    target_of,
)
from benchmarks.experiments.optimizers.task import Size
from benchmarks.experiments.optimizers.tasks import TASKS
from benchmarks.experiments.optimizers.training import scores
from benchmarks.experiments.statistics import grouped, mean_of
from benchmarks.experiments.tables import NOTHING, markdown, methods_of

SIZES = tuple(field.name for field in fields(Size))


def report(lines: Sequence[Line], folder: Path) -> str:
    """The protocol's numbers, task by task; curves go to the folder."""
    text = f"# {PROTOCOL}\nSettings are drawn from these ranges:\n\n{ranges()}\n"
    for number, (group, those) in enumerate(grouped(lines, ("task", *SIZES)).items()):
        task = str(group[0])
        size = ", ".join(f"{n} {v}" for n, v in zip(SIZES, group[1:], strict=True))
        text += f"## {task}\n\n{TASKS[task].about}. {size}.\n\n"
        text += "\n".join(part for part in parts(task, those) if part) + "\n"
        draw(those, TASKS[task].measure, folder / f"optimizers-{task}-{number}")
    return text


def ranges() -> str:
    """The ranges that settings are drawn from."""
    names = list(dict.fromkeys(name for one in METHODS.values() for name in one.ranges))
    rows = [
        [method, *(one.ranges[n].text() if n in one.ranges else NOTHING for n in names)]
        for method, one in METHODS.items()
    ]
    return markdown(["method", *names], rows)


def parts(task: str, lines: Sequence[Line]) -> Iterator[str]:
    """The tables of one task and size, by the largest budget of trials that was run."""
    budget = max((line.cell["trials"] for line in lines if "trials" in line.cell), default=0)
    lines = [line for line in lines if line.cell.get("trials", budget) == budget]
    phases = {phase: those for (phase,), those in grouped(lines, ("phase",)).items()}
    measure = TASKS[task].measure
    yield searches(phases.get("search", []))
    finals = phases.get("final", [])
    first_order = [name for name in methods_of(lines) if METHODS[name].first_order]
    found = target_of(finals, first_order)
    if found is not None:
        best, target = found
        yield f"Target: {measure} {abs(target):.4f}, the lowest of {best}'s final seeds.\n"
        yield to_target(phases, measure, target, first_order)
        yield all_horizons(finals, measure, target)
    yield costs(phases.get("cost", []))


def best_lines(lines: Sequence[Line]) -> dict[str, Line]:
    """By method, the trial with the best score."""
    found = {}
    for (method,), those in grouped(lines, ("method",)).items():
        known = [line for line in those if line.found["score"] is not None]
        if known:
            found[str(method)] = max(known, key=lambda line: line.found["score"])
    return found


def searches(lines: Sequence[Line]) -> str:
    """How each method's search went."""
    best, rows = best_lines(lines), []
    for (method,), those in grouped(lines, ("method",)).items():
        known = [line.found["score"] for line in those if line.found["score"] is not None]
        texts = [f"{abs(value):.4f}" for value in (max(known), median(known))] if known else []
        settings = best[method].found["settings"] if known else {}
        rows.append(
            [
                method,
                f"{len(those)} of {those[0].cell['trials']}",
                *(texts or [NOTHING] * 2),
                str(len(those) - len(known)),
                ", ".join(f"{name} {short(value)}" for name, value in settings.items()),
            ]
        )
    return markdown(
        ["method", "trials", "best", "median", "diverged", "settings of the best"], rows
    )


def short(value: Any) -> str:
    """A setting in few digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def to_target(
    phases: dict[str, list[Line]], measure: str, target: float, first_order: Sequence[str]
) -> str:
    """Steps and seconds to the target at the horizon that seed 0 chose, and final scores.

    Ratios are to the fewest steps, and to the least time, of any first-order method.
    """
    finals, best = phases["final"], best_lines(phases["search"])
    goal = max(best[name].found["score"] for name in first_order if name in best)
    found: dict[str, tuple[float, Arrival]] = {}
    for name in (name for name in methods_of(finals) if name in best):
        horizon = horizon_on_first_seed(phases.get("schedule", []), name, best, measure, goal)
        if (one := arrival(of(finals, name, horizon), measure, target)) is not None:
            found[name] = horizon, one
    least = [
        min((getattr(found[n][1], kind) for n in first_order if n in found), default=inf)
        for kind in ("steps", "seconds")
    ]
    rows = []
    for name, (horizon, one) in found.items():
        final = mean_of(of(finals, name, FULL), lambda line: absolute(line.found["score"]))
        rows.append(
            [
                name,
                f"{horizon:g}",
                f"{one.reached} of {one.count}",
                *(finite(value, "g") for value in (one.steps,)),
                finite(one.seconds, ".2f"),
                finite(one.steps / least[0], ".2f"),
                finite(one.seconds / least[1], ".2f"),
                final.text(".4f") if final else NOTHING,
            ]
        )
    heading = ["method", "horizon", "reached", "steps", "seconds", "of steps", "of seconds"]
    return markdown([*heading, f"final {measure}, full horizon"], rows)


def absolute(value: float | None) -> float | None:
    """A score as its measure; NLLs are negative as scores."""
    return None if value is None else abs(value)


def finite(value: float, form: str) -> str:
    """A number, or a dash."""
    return f"{value:{form}}" if isfinite(value) else NOTHING


def all_horizons(finals: Sequence[Line], measure: str, target: float) -> str:
    """Median steps, seconds and seeds that reached the target, at every horizon."""
    rows = []
    for name in methods_of(finals):
        texts = []
        for horizon in HORIZONS:
            one = arrival(of(finals, name, horizon), measure, target)
            texts.append(arrived(one) if one else NOTHING)
        rows.append([name, *texts])
    return markdown(["method", *(f"horizon {horizon:g}" for horizon in HORIZONS)], rows)


def arrived(one: Arrival) -> str:
    """Steps, seconds, and how many seeds got there."""
    found = f"{one.steps:g}, {one.seconds:.2f} s" if isfinite(one.steps) else NOTHING
    return f"{found} ({one.reached})"


def costs(lines: Sequence[Line]) -> str:
    """A step beside AdamW's."""
    rows = [
        [
            str(line.cell["method"]),
            f"{1000 * sum(line.found['cycle']) / len(line.found['cycle']):.2f}",
            f"{line.found['ratio']:.2f}",
            f"{line.found['largest']:.2f}",
            NOTHING if line.found["state"] is None else f"{line.found['state']:.1f}",
            str(line.found["parameters"]),
        ]
        for line in lines
    ]
    heading = ["method", "ms a step", "of AdamW's", "longest of a cycle, of AdamW's"]
    return markdown([*heading, "numbers kept for a parameter", "parameters"], rows)


def draw(lines: Sequence[Line], measure: str, path: Path) -> None:
    """Median curves of the final seeds at the full horizon, over steps and over seconds."""
    finals = [line for line in lines if line.cell["phase"] == "final"]
    for axis in ("steps", "seconds") if finals else ():
        series = {}
        for name in methods_of(finals):
            runs = [line for line in of(finals, name, FULL) if not line.found["diverged"]]
            if runs:
                series[name] = list(points(runs, measure, axis))
        label = axis if axis == "steps" else f"{axis} of training"
        curves(series, (label, measure), path.with_name(f"{path.name}-{axis}.png"))


def points(runs: Sequence[Line], measure: str, axis: str) -> Iterator[tuple[float, float]]:
    """Medians over runs of the same evaluations."""
    for place, step in enumerate(runs[0].found["curve"]["step"]):
        where = median(line.found["curve"][clock_of(line)][place] for line in runs)
        values = [scores(line.found["curve"], measure)[place] for line in runs]
        yield step if axis == "steps" else where, abs(median(values))
