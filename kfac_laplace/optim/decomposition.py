"""The bases of all groups, decomposed when they are due."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.optim.bases import Bases, Eigenbases, Side, decompose, own_coordinates
from kfac_laplace.optim.schedule import Schedule, SideOf
from kfac_laplace.options import check_whole

log = logging.getLogger("kfac_laplace")

SIDES = ("left", "right")
#: B and A.
Factors = tuple[Tensor, Tensor]


class BasesTable:
    """The bases of all groups with factors, made anew by schedule (`Schedule`).

    A run that is resumed goes on as it would have.

    Args:
        shapes: of each group's matrices, (b, o, i), by name.
        every: steps between two decompositions of a side.
        largest: a side wider than this stays in its own coordinates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], *, every: int, largest: int):
        check_whole("every", every, least=1)
        check_whole("largest", largest, least=0)
        self._shapes, self._largest = dict(shapes), largest
        self._schedule = Schedule(shapes, every=every, largest=largest)
        self._sides: dict[SideOf, Side] = {}
        self._failed: set[SideOf] = set()  # of which a log record has told
        self._kept: dict[tuple[str, ...], Eigenbases] = {}

    def due(self, step: int) -> set[str]:
        """Names of the groups of which some side is due at a step (1, 2, …)."""
        return {name for name, _ in self._schedule.due(step)}

    def update(
        self, step: int, factors: Mapping[str, Factors], dtype: torch.dtype | None = None
    ) -> bool:
        """Decompose what is due at a step; whether any basis changed.

        Where a decomposition fails in float32 and in float64, or a factor is not finite, the old
        basis is kept and a log record says so, once for each side. A side that has no basis yet is
        due at any step at which its factor is there, whatever the schedule says; one that waits for
        its first step has its own coordinates until then.

        Args:
            step: number of the step, from 1.
            factors: B (b, o, o) and A (b, i, i), either possibly a diagonal (b, o), (b, i), per
                example of the mean loss, by name. Groups that are not in it are not due.
            dtype: of the bases, that of the gradients; None for that of the factors.
        """
        due = set(self._schedule.due(step))
        sides = [
            side
            for name in factors
            for side in ((name, 0), (name, 1))
            if side in due or side not in self._sides
        ]
        for name in {name for name, _ in sides}:
            self._check(name, factors[name])
        wanted = [self._wanted(side, factors[side[0]][side[1]], step) for side in sides]
        found = decompose(wanted, largest=self._largest, dtype=dtype)
        made = {side: one for side, one in zip(sides, found, strict=True) if one is not None}
        for side in sides:
            if side not in made:
                self._tell(side)
        self._sides.update(made)
        if made:
            self._kept.clear()
        return bool(made)

    def _wanted(self, side: SideOf, factor: Tensor, step: int) -> Tensor:
        """A factor, or its diagonal while the side waits for its first decomposition."""
        waits = factor.ndim == 3 and self._schedule.waits(side, step)
        return factor.diagonal(dim1=-2, dim2=-1) if waits else factor

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
