"""Which factors are decomposed when, and the bases that result: one table for all groups."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim.bases import Bases, Eigenbases, Side, decompose, own_coordinates
from kfac_laplace.options import check_whole

log = logging.getLogger("kfac_laplace")

#: Steps of a run at which every basis is made anew, as factors change most at its start.
EARLY = (1, 2, 4, 7)
#: Decompositions worth so many operations (d³) are not spread over steps: 2.5 ms on one core.
CHEAP = 2**24
#: From so many operations on, seconds on one core, those of an early step are worth a word.
DEAR = 2**34
#: A side of a group: its name, and 0 for the left (B) or 1 for the right (A).
SideOf = tuple[str, int]
SIDES = ("left", "right")
#: B and A.
Factors = tuple[Tensor, Tensor]


class BasesTable:
    """The bases of all groups with factors, made anew by schedule.

    All sides at the steps `EARLY`; afterwards each side once in `every` steps. Where all together
    would take longer than a step should (`CHEAP`), they fall on several steps, at about the same
    cost each; what is cheap is done at multiples of `every`. Which are due depends on the step
    alone, so a run that is resumed goes on as it would have.

    Args:
        shapes: of each group's matrices, (b, o, i), by name.
        every: steps between two decompositions of a side.
        largest: a side wider than this stays in its own coordinates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], *, every: int, largest: int):
        check_whole("every", every, least=1)
        check_whole("largest", largest, least=0)
        self._shapes, self._every, self._largest = dict(shapes), every, largest
        self._phases = phases(_costs(shapes, largest), every)
        self._sides: dict[SideOf, Side] = {}
        self._failed: set[SideOf] = set()  # of which a log record has told
        self._kept: dict[tuple[str, ...], Eigenbases] = {}

    def due(self, step: int) -> set[str]:
        """Names of the groups of which some side is due at a step (1, 2, …)."""
        return {name for name, _ in self._due(step)}

    def _due(self, step: int) -> list[SideOf]:
        """Sides that are due at a step."""
        early, phase = step in EARLY, step % self._every
        return [side for side, its in self._phases.items() if early or its == phase]

    def update(
        self, step: int, factors: Mapping[str, Factors], dtype: torch.dtype | None = None
    ) -> bool:
        """Decompose what is due at a step; whether any basis changed.

        Where a decomposition fails in float32 and in float64, or a factor is not finite, the old
        basis is kept and a log record says so, once for each side. A side that has no basis yet is
        due at any step at which its factor is there, whatever the schedule says.

        Args:
            step: number of the step, from 1.
            factors: B (b, o, o) and A (b, i, i), either possibly a diagonal (b, o), (b, i), per
                example of the mean loss, by name. Groups that are not in it are not due.
            dtype: of the bases, that of the gradients; None for that of the factors.
        """
        due = set(self._due(step))
        sides = [
            side
            for name in factors
            for side in ((name, 0), (name, 1))
            if side in due or side not in self._sides
        ]
        for name in {name for name, _ in sides}:
            self._check(name, factors[name])
        found = decompose(
            [factors[name][which] for name, which in sides], largest=self._largest, dtype=dtype
        )
        made = {side: one for side, one in zip(sides, found, strict=True) if one is not None}
        for side in sides:
            if side not in made:
                self._tell(side)
        self._sides.update(made)
        if made:
            self._kept.clear()
        return bool(made)

    def _check(self, name: str, factors: Factors) -> None:
        """Factors have the shapes of the group's sides."""
        b, *widths = self._shapes[name]
        for which, (factor, d) in enumerate(zip(factors, widths, strict=True)):
            if tuple(factor.shape) not in ((b, d, d), (b, d)):
                raise InvalidValue(
                    f"the {SIDES[which]} factor does not fit its matrices",
                    where=name,
                    got=f"{tuple(factor.shape)} where the matrices are {(b, *widths)}",
                    remedy=f"Pass {(b, d, d)}, or its diagonal {(b, d)}",
                )

    def _tell(self, side: SideOf) -> None:
        """Say, once for each side, that a factor could not be decomposed."""
        if side in self._failed:
            return
        self._failed.add(side)
        name, which = side
        log.warning(
            "%s: the %s Kronecker factor is not finite or has no eigenbasis, also in float64; its "
            "%s. Look for a loss or activations that are not finite. Further failures of this "
            "factor are not reported",
            name,
            SIDES[which],
            "basis stays as it was" if side in self._sides else "coordinates stay the layer's own",
        )

    def bases(self, name: str, like: Tensor) -> Bases:
        """The bases of a group; of sides that have none yet, own coordinates and ones.

        Args:
            name: of the group.
            like: its gradient (b, o, i).
        """
        left, right = self._sides.get((name, 0)), self._sides.get((name, 1))
        if left is not None and right is not None:
            return Bases(left, right)
        plain = own_coordinates(like)
        return Bases(left or plain.left, right or plain.right)

    def eigenbases(self, names: Sequence[str], likes: Sequence[Tensor]) -> Eigenbases:
        """Those of some groups in this order; the same object until a basis changes.

        Args:
            names: of the groups.
            likes: their gradients (b, o, i).
        """
        key = tuple(names)
        if key not in self._kept:
            pairs = zip(names, likes, strict=True)
            self._kept[key] = Eigenbases([self.bases(name, like) for name, like in pairs])
        return self._kept[key]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by group and "left_values", "left_vectors", "right_values", "right_vectors"."""
        state: dict[str, dict[str, Tensor]] = {}
        for (name, which), side in self._sides.items():
            tensors = state.setdefault(name, {})
            tensors[f"{SIDES[which]}_values"] = side.values
            if side.vectors is not None:
                tensors[f"{SIDES[which]}_vectors"] = side.vectors
        return state

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up bases as they were stored; further updates go on bit by bit."""
        if unknown := sorted(set(state) - set(self._shapes)):
            raise InvalidValue(
                "the state has bases of groups that are not here",
                where="load_state_dict",
                got=", ".join(unknown),
                remedy="Load it into an optimiser of the same model and options",
            )
        self._sides = {
            (name, which): Side(tensors[f"{side}_values"], tensors.get(f"{side}_vectors"))
            for name, tensors in state.items()
            for which, side in enumerate(SIDES)
            if f"{side}_values" in tensors
        }
        self._kept.clear()


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


def affordable(shapes: Mapping[str, tuple[int, int, int]], largest: int) -> int | None:
    """The `largest` under which the decompositions of an early step stay below `DEAR` operations.

    Args:
        shapes: of each group's matrices, (b, o, i), by name.
        largest: the one that is set.

    Returns:
        The width of the widest side that may be decomposed with all narrower ones, 0 if none may;
        None where `largest` does as well.
    """
    by_width: dict[int, int] = {}
    for b, *widths in shapes.values():
        for d in widths:
            if d <= largest:
                by_width[d] = by_width.get(d, 0) + b * d**3
    total = found = 0
    for d in sorted(by_width):
        total += by_width[d]
        if total > DEAR:
            return found
        found = d
    return None


def _costs(shapes: Mapping[str, tuple[int, int, int]], largest: int) -> dict[SideOf, int]:
    """Operations of each side's decompositions, up to a constant."""
    return {
        (name, which): b * (d**3 if d <= largest else d)
        for name, (b, *widths) in shapes.items()
        for which, d in enumerate(widths)
    }
