"""Which factors are decomposed when, and the bases that result: one table for all groups."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.optim.bases import Bases, Eigenbases

#: Steps of a run at which every basis is made anew, as factors change most at its start.
EARLY = (1, 2, 4, 7)


class BasesTable:
    """The bases of all groups with factors, made anew by schedule.

    All sides at the steps `EARLY`; afterwards each side once in `every` steps, at a phase of its
    own by which the cost (d³) of the sides that fall on one step is about equal. Which are due
    depends on the step alone, so a run that is resumed goes on as it would have.

    Args:
        shapes: of each group's matrices, (b, o, i), by name.
        every: steps between two decompositions of a side.
        largest: a side wider than this stays in its own coordinates.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], *, every: int, largest: int):
        raise NotImplementedError

    def due(self, step: int) -> set[str]:
        """Names of the groups of which some side is due at a step (1, 2, …)."""
        raise NotImplementedError

    def update(
        self,
        step: int,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        dtype: torch.dtype | None = None,
    ) -> bool:
        """Decompose what is due at a step; whether any basis changed.

        Where a decomposition fails in float32 and in float64, or a factor is not finite, the old
        basis is kept and a log record says so, once for each side. A group that has no basis yet
        gets one at the first step at which its factors are there, whatever the schedule says.

        Args:
            step: number of the step, from 1.
            factors: B (b, o, o) and A (b, i, i), either possibly a diagonal (b, o), (b, i), per
                example of the mean loss, by name; needed for the groups that are `due`.
            dtype: of the bases, that of the gradients; None for that of the factors.
        """
        raise NotImplementedError

    def bases(self, name: str) -> Bases:
        """The bases of a group; own coordinates and values of one before its first factors."""
        raise NotImplementedError

    def eigenbases(self, names: Sequence[str]) -> Eigenbases:
        """Those of some groups in this order; the same object until a basis changes."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by group and "left_values", "left_vectors", "right_values", "right_vectors"."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up bases as they were stored; further updates go on bit by bit."""
        raise NotImplementedError
