"""Ranges that settings are drawn from, and the draw: a Latin hypercube."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Setting = float | str


class Range(Protocol):
    """Values by their place in the range."""

    def at(self, place: float) -> Setting:
        """The value at a place in [0, 1)."""
        ...

    def text(self) -> str:
        """For a table."""
        ...


@dataclass(frozen=True)
class Even:
    """Numbers between two, all alike."""

    low: float
    high: float

    def at(self, place: float) -> float:
        """See `Range.at`."""
        return self.low + place * (self.high - self.low)

    def text(self) -> str:
        """See `Range.text`."""
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Logarithmic:
    """Positive numbers between two, their logarithms all alike."""

    low: float
    high: float

    def at(self, place: float) -> float:
        """See `Range.at`."""
        return self.low * (self.high / self.low) ** place

    def text(self) -> str:
        """See `Range.text`."""
        return f"{self.low:g} to {self.high:g}, logarithmic"


@dataclass(frozen=True)
class Decay:
    """Decays β with logarithmic 1 − β between two numbers."""

    low: float
    high: float

    def at(self, place: float) -> float:
        """See `Range.at`."""
        return 1 - Logarithmic(self.low, self.high).at(place)

    def text(self) -> str:
        """See `Range.text`."""
        return f"1 − ({self.low:g} to {self.high:g}, logarithmic)"


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def at(self, place: float) -> str:
        """See `Range.at`."""
        return self.names[int(place * len(self.names))]

    def text(self) -> str:
        """See `Range.text`."""
        return " or ".join(self.names)


def middle(ranges: Mapping[str, Range]) -> dict[str, Setting]:
    """The settings in the middle of all ranges."""
    return {name: one.at(0.5) for name, one in ranges.items()}


def drawn(ranges: Mapping[str, Range], trials: int) -> list[dict[str, Setting]]:
    """A Latin hypercube: of each range cut in `trials` parts, every part occurs once.

    The draw depends on the number of trials and on the order of the ranges alone: methods whose
    ranges are the same try the same settings.

    Args:
        ranges: by name.
        trials: how many settings.
    """
    generator = torch.Generator().manual_seed(0)
    columns = {}
    for name, one in ranges.items():
        parts = torch.randperm(trials, generator=generator).double()
        places = (parts + torch.rand(trials, generator=generator, dtype=torch.float64)) / trials
        columns[name] = [one.at(place) for place in places.tolist()]
    return [{name: column[trial] for name, column in columns.items()} for trial in range(trials)]
