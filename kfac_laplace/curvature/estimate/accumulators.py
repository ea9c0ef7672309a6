"""Sums over one batch, a class for each kind of block, fed with gradient rows vector by vector."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Bases, Block
from kfac_laplace.curvature.estimate.eigen_block import EigenBlock
from kfac_laplace.curvature.estimate.exact_blocks import DenseBlock, DiagonalBlock
from kfac_laplace.curvature.gradients.by_group import (
    factored_gradient,
    flat_gradients,
    gradient_pieces,
)
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.linalg.gram import GramSum
from kfac_laplace.curvature.rows.layout import Layout


class Accumulator(ABC):
    """The block of one batch in the making.

    For each backward vector it receives the gradient rows of its uses, in any order, and is then
    told that there are no more.
    """

    #: Indices of the uses whose gradient rows it wants.
    uses: frozenset[int] = frozenset()

    @abstractmethod
    def receive(self, use: int, rows: Tensor) -> None:
        """Take the gradient rows (1, b, *lead, o) of a use for the vector at hand."""

    @abstractmethod
    def finish_vector(self, generic: Mapping[str, Tensor]) -> None:
        """Add what the vector at hand contributes.

        Args:
            generic: per-example gradients (1, n, b, o, i) of the groups without a layer rule.
        """

    def foresee(self, vectors: int) -> None:  # noqa: B027 - most sums do not ask
        """Say how many vectors there were to come, where fewer do: few rows are not kept then."""

    @abstractmethod
    def block(self) -> Block:
        """The finished block."""


class WholeGradients(Accumulator):
    """A sum that needs the rows of all its uses together."""

    def __init__(self, groups: Sequence[Group], passed: ForwardPass):
        self._passed = passed
        self.uses = frozenset(u for group in groups for u in passed.uses[group.name])
        self._rows: dict[int, Tensor] = {}

    def receive(self, use: int, rows: Tensor) -> None:
        """Keep the rows until the last have come."""
        self._rows[use] = rows

    def finish_vector(self, generic: Mapping[str, Tensor]) -> None:
        """Add the contribution of all rows, and let them go."""
        self._add(self._rows, generic)
        self._rows = {}

    @abstractmethod
    def _add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Add what gradient rows and generic gradients contribute."""


class DiagonalAccumulator(WholeGradients):
    """Σ_v Σ_n (per-example gradient)², exact."""

    def __init__(self, group: Group, passed: ForwardPass):
        super().__init__([group], passed)
        self._group = group
        like = accumulable(passed.params[group.layout.params[0]].detach())
        self._values = like.new_zeros(group.layout.matrix)

    def _add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Square the per-example gradients, in factored form where there is one."""
        if self._group.factored:
            factored = factored_gradient(self._passed, self._group, rows)
            if factored is not None:
                self._values += factored.squares(self._passed.budget)
            return
        for piece in gradient_pieces(self._passed, self._group, rows, generic):
            self._values += piece.square().sum((0, 1))

    def block(self) -> DiagonalBlock:
        """The diagonal."""
        inside = self._group.block_layout
        return DiagonalBlock(inside, inside.of_whole(self._values))


class EigenAccumulator(WholeGradients):
    """Σ_v Σ_n (U_Bᵀ G U_A)² of per-example gradients G, exact [EKFAC18, eq. 10]."""

    def __init__(self, group: Group, passed: ForwardPass, bases: Bases):
        super().__init__([group], passed)
        self._group, self._bases = group, bases
        self._values = bases[0].new_zeros(group.layout.matrix, device=passed.device)

    def _add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Turn the per-example gradients in factored form, and square them."""
        factored = factored_gradient(self._passed, self._group, rows)
        if factored is not None:
            (left, right), like = self._bases, factored.left
            turned = factored.turned(left.to(like), None if right is None else right.to(like))
            self._values += turned.squares(self._passed.budget)

    def block(self) -> EigenBlock:
        """The diagonal in its bases."""
        return EigenBlock.of(self._group.layout, self._values, self._bases)


class DenseAccumulator(WholeGradients):
    """Σ_v Σ_n g gᵀ over some groups together, exact."""

    def __init__(
        self, groups: Sequence[Group], layout: Layout, passed: ForwardPass, dtype: SumDtype
    ):
        super().__init__(groups, passed)
        self._layout = layout
        self._sum = GramSum(1, layout.size, passed.params[layout.params[0]].detach(), dtype)

    def _add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Add the outer products of whole gradients."""
        flat = flat_gradients(self._passed, self._layout, (rows, generic))  # (v, n, p)
        if flat is not None:
            self._sum.add(flat.flatten(0, 1)[None])

    def foresee(self, vectors: int) -> None:
        """Multiply from the first row on if so many vectors will bring many."""
        self._sum.foresee(vectors * self._passed.n)

    def block(self) -> DenseBlock:
        """The matrix."""
        return DenseBlock(self._layout, self._sum.total()[0])
