"""How far figures over n examples would be off by chance: resamples of the examples.

A resample is a vector of weights, how often each example was drawn. Figures are functions of
weights, so that those of the data as they are (all weights one) and of all resamples are one
computation over a matrix, a chunk of its rows at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_number, check_whole

#: Numbers that a chunk of weights may have.
CHUNK = 2**22

Key = TypeVar("Key")

#: Means of absolute values, which noise makes larger: in the data, and in resamples once more.
MIRRORED = ("ece",)

Interval = tuple[float, float]

#: A value, and the ends of its interval.
Difference = tuple[float, float, float]


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of examples, the same ones for all that is compared on the same data.

    Args:
        resamples: their number; 0 for no intervals.
        level: probability of the intervals.
        seed: of the draws.

    Raises:
        InvalidType, InvalidValue: a number of resamples below 0, a level outside (0, 1).
    """

    resamples: int = 1000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_whole("resamples", self.resamples, 0)
        if not 0 < check_number("level", self.level) < 1:
            raise InvalidValue("must lie between 0 and 1", where="level", got=self.level)

    def replicates(
        self, figures: Callable[..., dict[Key, Tensor]], counts: Sequence[int], width: int
    ) -> dict[Key, Tensor]:
        """Figures of the data, and then of each resample, float64 (1 + resamples,).

        Args:
            figures: weights (b, n) of each group to figures (b,).
            counts: number of examples of each group, which are resampled on their own.
            width: most numbers that `figures` makes for one resample at a time.
        """
        parts = [figures(*weights) for weights in self._weights(counts, width)]
        return {name: torch.cat([part[name] for part in parts]).double() for name in parts[0]}

    def _weights(self, counts: Sequence[int], width: int) -> Iterator[list[Tensor]]:
        """Ones, then the resamples; single examples have nothing to be resampled with."""
        yield [torch.ones(1, n, dtype=torch.float64, device="cpu") for n in counts]
        draws = [
            torch.Generator().manual_seed((self.seed + turn) % 2**63)
            for turn, _ in enumerate(counts)
        ]
        left, at_once = self.resamples if min(counts) > 1 else 0, max(1, CHUNK // width)
        while left:
            b = min(left, at_once)
            yield [_drawn(b, n, draw) for n, draw in zip(counts, draws, strict=True)]
            left -= b

    def interval(
        self, name: str, replicates: Tensor, by_chance: Tensor | None = None
    ) -> Interval | None:
        """Where a figure lies: the middle `level` of its replicates; None without any.

        An ECE's are mirrored at its value: they are further up than it for the reason for which it
        is further up than the truth. It begins at 0 where as large a value comes by chance.

        Args:
            name: of the figure.
            replicates: as `replicates` has them.
            by_chance: an ECE's where nothing but chance parts accuracy and confidence.
        """
        found = self._middle(replicates[1:])
        if found is None or name not in MIRRORED:
            return found
        value, (low, high) = float(replicates[0]), found
        low, high = max(0.0, 2 * value - high), max(0.0, 2 * value - low)
        noise = None if by_chance is None else self._middle(by_chance[1:])
        return (0.0 if noise is not None and value <= noise[1] else low), max(high, value)

    def difference(self, name: str, one: Tensor, other: Tensor) -> Difference | None:
        """One figure minus another on the same resamples, with the ends of its interval."""
        gaps = one - other
        found = self._middle(gaps[1:])
        if found is None:
            return None
        value, (low, high) = float(gaps[0]), found
        if name in MIRRORED:
            low, high = 2 * value - high, 2 * value - low
        return value, low, high

    def _middle(self, replicates: Tensor) -> Interval | None:
        """Quantiles of those that are numbers: a resample may have no row that counts."""
        known = replicates[~replicates.isnan()]
        if not len(known):
            return None
        tails = known.new_tensor([(1 - self.level) / 2, (1 + self.level) / 2])
        low, high = (float(end) for end in known.quantile(tails))
        return low, high


def _drawn(b: int, n: int, generator: torch.Generator) -> Tensor:
    """How often n draws with replacement take each of n examples, (b, n)."""
    places = torch.randint(n, (b, n), generator=generator, device="cpu")
    weights = torch.zeros(b, n, dtype=torch.float64, device="cpu")
    return weights.scatter_add_(1, places, weights.new_ones(b, n))
