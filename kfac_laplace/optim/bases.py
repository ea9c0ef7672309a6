"""Eigenbases of Kronecker factors, and gradients turned into them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Eigenvalues and eigenvectors of one side's factors, for b blocks.

    Args:
        values: eigenvalues (b, d), ascending, none below zero; in own coordinates the diagonal.
        vectors: eigenvectors as columns (b, d, d), or None: the side stays in its own coordinates.
    """

    values: Tensor
    vectors: Tensor | None = None


@dataclass(frozen=True)
class Bases:
    """Both sides of a group: B = Q_B diag(left.values) Q_Bᵀ (b, o, o), A likewise (b, i, i)."""

    left: Side
    right: Side


class Eigenbases:
    """The bases of several groups, to turn their matrices all at once.

    Small groups of one shape are turned together; what that needs is kept, so make one of these
    when bases change and use it until they change again.

    Args:
        bases: of each group, in the order of the lists that the methods take.
    """

    def __init__(self, bases: Sequence[Bases]):
        self.bases = tuple(bases)

    def enter(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Q_Bᵀ M Q_A for each group's matrices (b, o, i); the same tensor where both are None."""
        raise NotImplementedError

    def leave(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Q_B M Q_Aᵀ for each group's matrices (b, o, i); the same tensor where both are None."""
        raise NotImplementedError

    def only(self, indices: Sequence[int]) -> "Eigenbases":
        """Those of some groups: the ones that have gradients in a step."""
        raise NotImplementedError
