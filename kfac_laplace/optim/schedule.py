"""At which steps the factors of which sides are decomposed."""

from collections.abc import Mapping
from dataclasses import dataclass

#: Steps of a run at which every basis is made anew, as factors change most at its start.
EARLY = (1, 2, 4, 7)
#: Decompositions worth so many operations (d³) are not spread over steps: 2.5 ms on one core.
CHEAP = 2**24
#: From so many operations on, seconds on one core, those of a single step are worth a word.
DEAR = 2**34
#: A side k times as wide is due k times as late and as seldom.
WIDE = 512
#: A side of a group: its name, and 0 for the left (B) or 1 for the right (A).
SideOf = tuple[str, int]
#: Of each group's matrices, (b, o, i), by name.
Shapes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Times:
    """The steps at which one side is due.

    Args:
        stretch: k; early steps are k times those of `EARLY`.
        shift: by so many steps more.
        period: steps between two decompositions later on.
        phase: step modulo period at which they fall.
    """

    stretch: int
    shift: int
    period: int
    phase: int

    @property
    def first(self) -> int:
        """The first step at which the side is due."""
        return self.stretch * EARLY[0] + self.shift

    def has(self, step: int) -> bool:
        """Whether the side is due at a step (1, 2, …)."""
        early, rest = divmod(step - self.shift, self.stretch)
        return step >= self.first and (
            (rest == 0 and early in EARLY) or step % self.period == self.phase
        )


class Schedule:
    """When each side is decomposed. It depends on the step alone, so that runs can be resumed.

    All sides at the steps `EARLY`; afterwards each once in `every` steps. Where all together would
    take longer than a step should (`CHEAP`), they fall on several steps, at about the same cost
    each; what is cheap is done at multiples of `every`.

    A decomposition takes d³ operations, turning a gradient (o, d) into the basis o d² in each step:
    so that the former's share does not grow with the width, sides of k = d // `WIDE` > 1 are due k
    times as late and as seldom, and until then stay in their own coordinates. With `every` = 1
    nothing waits.

    Args:
        shapes: of each group's matrices.
        every: steps between two decompositions of a side.
        largest: a side wider than this stays in its own coordinates, which takes next to nothing.
    """

    def __init__(self, shapes: Shapes, *, every: int, largest: int):
        self._costs = {
            (name, which): b * d**3 if d <= largest else 0
            for name, (b, *widths) in shapes.items()
            for which, d in enumerate(widths)
        }
        stretches = {
            (name, which): 1 if every == 1 or d > largest else max(1, d // WIDE)
            for name, (_, *widths) in shapes.items()
            for which, d in enumerate(widths)
        }
        self._times: dict[SideOf, Times] = {}
        for stretch in sorted(set(stretches.values())):
            costs = {side: self._costs[side] for side, k in stretches.items() if k == stretch}
            shifts, later = phases(costs, stretch), phases(costs, stretch * every)
            for side in costs:
                self._times[side] = Times(stretch, shifts[side], stretch * every, later[side])

    def due(self, step: int) -> list[SideOf]:
        """Sides that are due at a step (1, 2, …)."""
        return [side for side, times in self._times.items() if times.has(step)]

    def waits(self, side: SideOf, step: int) -> bool:
        """Whether a step is before the first at which a side is due."""
        return step < self._times[side].first

    def dearest(self) -> int:
        """Operations of the dearest step, up to a constant."""
        last = max((EARLY[-1] * t.stretch + t.shift for t in self._times.values()), default=0)
        period = max((times.period for times in self._times.values()), default=0)
        steps = range(1, last + period + 1)
        return max((sum(self._costs[side] for side in self.due(step)) for step in steps), default=0)


def phases(costs: Mapping[SideOf, int], every: int) -> dict[SideOf, int]:
    """A phase 0 ≤ p < every for each side, so that the phases cost about the same.

    The dearest first, each where least has fallen so far: the dearest phase then costs at most the
    mean and one side more (Graham, "Bounds on multiprocessing timing anomalies"). So few phases are
    used, at equal distances, that each is worth `CHEAP`.
    """
    count = min(every, max(1, -(-sum(costs.values()) // CHEAP)))
    loads, placed = [0] * count, {}
    for side in sorted(costs, key=lambda side: (-costs[side], side)):
        slot = loads.index(min(loads))
        placed[side] = slot * every // count
        loads[slot] += costs[side]
    return placed


def affordable(shapes: Shapes, every: int, largest: int) -> int | None:
    """The `largest` under which the decompositions of each step stay below `DEAR` operations.

    Args:
        shapes: of each group's matrices.
        every: steps between two decompositions of a side.
        largest: the one that is set.

    Returns:
        The width of the widest side that may be decomposed with all narrower ones, 0 if none may;
        None where `largest` does as well.
    """
    if Schedule(shapes, every=every, largest=largest).dearest() <= DEAR:
        return None
    widths = {d for _, *both in shapes.values() for d in both if d <= largest}
    fitting = (
        d
        for d in sorted(widths, reverse=True)
        if Schedule(shapes, every=every, largest=d).dearest() <= DEAR
    )
    return next(fitting, 0)
