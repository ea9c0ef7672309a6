"""What log-determinants and predictions take of finished blocks: operations and bytes.

Decompositions of symmetric matrices are counted as textbooks do: eigenvalues take 4/3 d³, almost
all of it for the tridiagonal form, eigenvectors about 9 d³ in all, and a Cholesky factor d³/3.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.estimate.exact_blocks import DenseBlock
from kfac_laplace.curvature.estimate.low_rank import LowRankBlock
from kfac_laplace.curvature.estimate.structures import Structure, name_of
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.planning.held import few_rows, gram_sides, leading_sides

#: Operations in units of d³.
EIGENVALUES, EIGENVECTORS, CHOLESKY = 4 / 3, 9.0, 1 / 3
#: Bytes of float64, in which all of this is held.
DOUBLE = 8


@dataclass(frozen=True)
class Side:
    """Square symmetric matrices of one size.

    Args:
        size: rows d.
        count: how many of them.
        width: entries of d directions, where there are more than d: their matrix is not made.
    """

    size: int
    count: int = 1
    width: int = 0

    @property
    def cubes(self) -> int:
        """Σ d³."""
        return self.count * self.size**3

    @property
    def completing(self) -> int:
        """Operations that complete d directions to a basis, beside their eigenvectors."""
        return 8 * self.count * self.width * self.size**2

    @property
    def bytes(self) -> int:
        """Of all of them in float64: d², or the directions and two squares that complete them."""
        entries = self.width + 2 * self.size if self.width else self.size
        return DOUBLE * self.count * self.size * entries


@dataclass(frozen=True)
class Decompositions:
    """What has to be decomposed, and what is kept of it.

    Args:
        values: entries of the tables of eigenvalues, kept in float64.
        eigen: matrices whose eigenvalues the evidence asks for: factors, or of a factor that is
            few rows their inner products.
        bases: matrices whose eigenvectors predictions and samples ask for.
        cholesky: matrices of which one factor serves both.
    """

    values: int = 0
    eigen: tuple[Side, ...] = ()
    bases: tuple[Side, ...] = ()
    cholesky: tuple[Side, ...] = ()

    @property
    def operations(self) -> int:
        """Of the first log-determinant."""
        eigen = EIGENVALUES * sum(side.cubes for side in self.eigen)
        return int(eigen + CHOLESKY * sum(side.cubes for side in self.cholesky))

    @property
    def operations_of_bases(self) -> int:
        """Of the first prediction, beside that."""
        return int(EIGENVECTORS * sum(side.cubes for side in self.bases)) + self.completing

    @property
    def completing(self) -> int:
        """Operations of that beside eigenvectors, in products of matrices."""
        return sum(side.completing for side in self.bases)

    @property
    def bytes(self) -> int:
        """Held for log-determinants: eigenvalues or Cholesky factors."""
        return DOUBLE * self.values + sum(side.bytes for side in self.cholesky)

    @property
    def bytes_of_bases(self) -> int:
        """Held for predictions and samples beside that: eigenvectors."""
        return sum(side.bytes for side in self.bases)


def decompositions(
    groups: Iterable[Group], structure: Structure, blocks: Mapping[str, Block], batches: int
) -> Decompositions:
    """What the blocks of some groups ask for.

    Args:
        groups: of the parameters in the posterior.
        structure: of the GGN.
        blocks: of one batch, with or without numbers.
        batches: how many such batches there are.
    """
    groups, name = list(groups), name_of(structure)
    size = sum(group.block_layout.size for group in groups)
    if name == "full":
        return Decompositions(cholesky=(Side(size), Side(size)))  # the matrix, and its factor
    if isinstance(block := blocks.get("lowrank"), LowRankBlock):
        held = min(block.rank, block.layout.size, batches * len(block.rows))
        return Decompositions(cholesky=(Side(held),))
    eigen: list[Side] = []
    bases: list[Side] = []
    for group in groups:
        one = blocks[group.name]
        if isinstance(one, DenseBlock):
            eigen.append(Side(len(one.matrix)))
            bases.append(Side(len(one.matrix)))
        elif isinstance(one, KroneckerBlock):
            for packed, rows in gram_sides(one):
                b, _, i = rows.shape
                bases.append(Side(i, b))
                eigen.append(Side(min(i, few_rows(packed, rows, batches) or i), b))
            for rows, rank in leading_sides(one):
                b, k, i = rows.shape
                kept = min(rank, batches * k)
                bases.append(Side(kept, b, i))
                eigen.append(Side(kept, b))
    return Decompositions(size, tuple(eigen), tuple(bases))
