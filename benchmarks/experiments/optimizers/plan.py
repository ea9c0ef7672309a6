"""The cells of each phase, as far as finished ones tell them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.experiments.lines import Cell, Key, Line, key_of
from benchmarks.experiments.optimizers.task import Size

HORIZONS = (1.0, 0.7, 0.5, 0.3)
FULL = HORIZONS[0]


@dataclass(frozen=True)
class Budget:
    """How much is tried, the same for every method.

    Args:
        trials: settings in the search.
        seeds: final ones.
    """

    trials: int
    seeds: int


def cells_of(
    task: str, size: Size, methods: Sequence[str], budget: Budget, lines: Sequence[Line]
) -> Iterator[Cell]:
    """Costs and searches; schedules and finals of the methods whose search is finished.

    Args:
        task: its name.
        size: of the task.
        methods: their names.
        budget: how much is tried.
        lines: finished cells, of these and of other tasks and sizes.
    """
    finished = {key_of(line.cell): line for line in lines}
    searches = {name: list(search(task, size, name, budget)) for name in methods}
    for name in methods:
        yield {"task": task, **asdict(size), "phase": "cost", "method": name}
    for name in methods:
        yield from searches[name]
    best = [best_trial(searches[name], finished) for name in methods]
    known = [trial for trial in best if trial is not None]
    for trial in known:
        for horizon in HORIZONS[1:]:
            yield {**trial, "phase": "schedule", "horizon": horizon}
    # Methods take turns, so that what slows the machine for a while slows all of them.
    for seed in range(1, budget.seeds + 1):
        for horizon in HORIZONS:
            for trial in known:
                yield {**trial, "phase": "final", "horizon": horizon, "seed": seed}


def search(task: str, size: Size, method: str, budget: Budget) -> Iterator[dict[str, object]]:
    """The trials of a method."""
    for trial in range(budget.trials):
        yield {
            "task": task,
            **asdict(size),
            "phase": "search",
            "method": method,
            "trials": budget.trials,
            "trial": trial,
            "seed": 0,
            "horizon": FULL,
        }


def best_trial(
    trials: Sequence[dict[str, object]], finished: dict[Key, Line]
) -> dict[str, object] | None:
    """The trial with the best score; None while some are missing, and where all diverged."""
    found = [finished.get(key_of(cell)) for cell in trials]
    if not all(found):
        return None
    known = [line for line in found if line is not None and line.found["score"] is not None]
    return dict(max(known, key=lambda line: line.found["score"]).cell) if known else None
