"""Means over seeds with their standard errors, and differences between methods by seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean, stdev
from typing import Any

from benchmarks.experiments.lines import Line


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: of the values.
        error: standard error of the mean; NaN for one value.
        count: number of values.
    """

    mean: float
    error: float
    count: int

    def text(self, form: str = ".3f") -> str:
        """Mean ± standard error."""
        error = "" if isnan(self.error) else f" ± {self.error:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{error}"

    @property
    def worse(self) -> bool:
        """Whether a difference of losses is above 0.02 by more than its standard error."""
        return self.mean - (0.0 if isnan(self.error) else self.error) > TOLERANCE


#: Nats by which a method may be worse than another in a cell, beyond the standard error.
TOLERANCE = 0.02


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and standard error, or None of nothing."""
    if not values:
        return None
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(fmean(values), error, len(values))


def together(estimates: Sequence[Estimate]) -> Estimate | None:
    """Mean of the means of independent groups; its error is NaN where one has a single value."""
    if not estimates:
        return None
    error = sum(one.error**2 for one in estimates) ** 0.5 / len(estimates)
    return Estimate(
        fmean(one.mean for one in estimates), error, sum(one.count for one in estimates)
    )


Group = tuple[Any, ...]
Measure = str | Callable[[Line], float | None]


def value_of(line: Line, measure: Measure) -> float | None:
    """A number of a finished cell, None where it has none."""
    return measure(line) if callable(measure) else line.found.get(measure)


def grouped(lines: Sequence[Line], names: Sequence[str]) -> dict[Group, list[Line]]:
    """Lines by the entries of their cells, in the order of their first line."""
    found: dict[Group, list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line.cell.get(name) for name in names), []).append(line)
    return found


def mean_of(lines: Sequence[Line], measure: Measure) -> Estimate | None:
    """Mean over lines of a measure that some of them have."""
    values = [value_of(line, measure) for line in lines]
    return estimate([value for value in values if value is not None])


def by_seed(lines: Sequence[Line], measure: Measure, seed: str) -> Mapping[Any, float]:
    """A measure by seed."""
    found = {line.cell[seed]: value_of(line, measure) for line in lines}
    return {key: value for key, value in found.items() if value is not None}


def difference(
    lines: Sequence[Line], measure: Measure, one: str, other: str, seed: str = "seed"
) -> Estimate | None:
    """One method's measure minus another's, over the seeds that both have.

    Args:
        lines: of one cell but for method and seed.
        measure: a name in `found`, or a function of a line.
        one: name of a method.
        other: that of the baseline.
        seed: the entry that makes pairs.
    """
    mine, theirs = (
        by_seed([line for line in lines if line.cell["method"] == name], measure, seed)
        for name in (one, other)
    )
    return estimate([mine[key] - theirs[key] for key in mine if key in theirs])
