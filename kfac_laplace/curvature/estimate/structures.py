"""Which structure the GGN is to have: a word, or an object where there is something to choose."""

from dataclasses import dataclass
from typing import Literal, get_args

from kfac_laplace.options import check_whole, unknown


@dataclass(frozen=True)
class LowRank:
    """The leading directions of the whole GGN, as rows R (k, P) with H ≈ RᵀR, k ≤ `rank`.

    Args:
        rank: how many directions are kept. No fewer than the data have rows (N·C, or N·(C − 1) of
            softmax) make it the exact GGN, and its posterior the Gaussian process on these data.

    Example:
        Five examples have five rows, of which three are kept:

        >>> import torch
        >>> from kfac_laplace import Curvature, LowRank
        >>> model, x, y = torch.nn.Linear(6, 1), torch.eye(6)[:5], torch.ones(5, 1)
        >>> few = LowRank(rank=3)
        >>> curvature = Curvature(model, "regression", hessian_structure=few).fit([(x, y)])
        >>> curvature.blocks["lowrank"].rows.shape
        torch.Size([3, 7])
    """

    rank: int = 100

    def __post_init__(self) -> None:
        """Check the rank."""
        check_whole("rank", self.rank, 1)
        object.__setattr__(self, "rank", int(self.rank))


#: Kronecker factors where rules give them, their eigenbasis, the diagonal, the whole matrix, or its
#: leading directions
Word = Literal["kron", "ekfac", "diag", "full", "lowrank"]
Structure = Word | LowRank
STRUCTURES: tuple[Word, ...] = get_args(Word)
#: Structures that take Kronecker factors where there are rules.
FACTORED = ("kron", "ekfac")
#: Structures of one block for all parameters, which has their name.
TOGETHER = ("full", "lowrank")
#: Objects by name, as files store them.
NAMED = {"lowrank": LowRank}


def resolve(structure: object) -> Structure:
    """The structure that a word stands for, or the object itself.

    Raises:
        InvalidValue: no such structure.
    """
    if isinstance(structure, LowRank):
        return structure
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise unknown("hessian_structure", structure, STRUCTURES, "pass LowRank(rank=20)")
    return NAMED[structure]() if structure in NAMED else structure


def name_of(structure: Structure) -> str:
    """Its name, whatever the rank."""
    return "lowrank" if isinstance(structure, LowRank) else structure
