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


@dataclass(frozen=True)
class Kron:
    """Kronecker factors of which wide ones keep their leading directions and the mean of the rest.

    A factor with more than twice as many rows keeps `rank` of its eigenvectors. What is left of its
    trace is spread evenly over all other directions, whose curvature is neither lost nor doubled.

    Args:
        rank: how many directions wide factors keep. No factor is wide where no layer has more than
            twice as many inputs or outputs: then it is "kron".

    Example:
        Of a layer of 100 inputs, ten directions of its input factor are kept:

        >>> import torch
        >>> from kfac_laplace import Curvature, Kron
        >>> model, x, y = torch.nn.Linear(100, 1), torch.randn(50, 100), torch.randn(50, 1)
        >>> few = Kron(rank=10)
        >>> curvature = Curvature(model, "regression", hessian_structure=few).fit([(x, y)])
        >>> curvature.blocks["weight"].input_rows.shape
        torch.Size([1, 10, 101])
    """

    rank: int = 256

    def __post_init__(self) -> None:
        """Check the rank."""
        check_whole("rank", self.rank, 1)
        object.__setattr__(self, "rank", int(self.rank))


#: Kronecker factors where rules give them, their eigenbasis, the diagonal, the whole matrix, or its
#: leading directions
Word = Literal["kron", "ekfac", "diag", "full", "lowrank"]
Structure = Word | LowRank | Kron
STRUCTURES: tuple[Word, ...] = get_args(Word)
#: Names of those that take Kronecker factors where there are rules.
FACTORED = ("kron", "ekfac")
#: Structures of one block for all parameters, which has their name.
TOGETHER = ("full", "lowrank")
#: Objects by name, as files store them.
NAMED: dict[str, type[LowRank] | type[Kron]] = {"lowrank": LowRank, "kron": Kron}


def resolve(structure: object) -> Structure:
    """The structure that a word stands for, or the object itself.

    Raises:
        InvalidValue: no such structure.
    """
    if isinstance(structure, LowRank | Kron):
        return structure
    if not isinstance(structure, str) or structure not in STRUCTURES:
        raise unknown(
            "hessian_structure", structure, STRUCTURES, "pass LowRank(rank=20) or Kron(rank=64)"
        )
    return LowRank() if structure == "lowrank" else structure


def name_of(structure: Structure) -> str:
    """Its name, whatever the rank."""
    if isinstance(structure, LowRank):
        return "lowrank"
    return "kron" if isinstance(structure, Kron) else structure


def is_factored(structure: Structure) -> bool:
    """Whether it takes Kronecker factors where there are rules."""
    return name_of(structure) in FACTORED
