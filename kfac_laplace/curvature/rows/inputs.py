"""The rows that meet a weight."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.linalg.gram import Gram, GramSum
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.per_example import Factored, Outer
from kfac_laplace.curvature.rows.row_layout import RowLayout


class Inputs(ABC):
    """The rows a_{n,t} that meet a weight: one for each example and shared position.

    A rule that can do better than build all rows overrides `pieces` or `gram`, and `example_sums`.
    """

    #: Whether `gram` gives a diagonal (b, i) instead of matrices: rows with one entry each.
    diagonal = False
    #: Whether rows that receive no gradient are left out of A: padding, tokens that nothing reads.
    droppable = False

    @property
    def key(self) -> Hashable | None:
        """Equal keys of inputs that exist at one time mean the same rows; None: not known."""
        return None

    @property
    @abstractmethod
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the rows; the example axis is one of them, alone or flattened."""

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows in at least float32, shape (b, *lead, i)."""

    def gram(self, dtype: SumDtype, budget: Budget) -> Gram | Tensor:
        """Σ_{n,t} a aᵀ for each of the b blocks, or its diagonal (b, i) if that is all there is.

        Args:
            dtype: the precision of products and sums.
            budget: how many rows exist at a time, where not all do.
        """
        total: GramSum | None = None
        for piece in self.pieces(dtype, budget):
            if total is None:
                total = GramSum(len(piece), piece.shape[-1], piece, dtype)
            total.add(piece)
            del piece  # which the sums need no memory beside
        assert total is not None
        return total.gram()

    def gram_diagonal(self, dtype: SumDtype, budget: Budget) -> Tensor:
        """The diagonal Σ_{n,t} a², shape (b, i). Arguments as for `gram`."""
        total: Tensor | None = None
        for piece in self.pieces(dtype, budget):
            squares = piece.flatten(1, -2).square().sum(1, dtype=dtype.sums(piece))
            total = squares if total is None else total + squares
        assert total is not None
        return total

    def pieces(self, dtype: SumDtype, budget: Budget) -> Iterator[Tensor]:
        """All rows, some at a time: shape (b, ..., i). Arguments as for `gram`."""
        yield self.rows()

    def bordered_gram(self, dtype: SumDtype, budget: Budget) -> Gram | None:
        """That of rows with a 1 appended, where there is a better way than pieces."""
        return None

    def row_sum(self, dtype: SumDtype) -> Tensor:
        """Σ_{n,t} a, shape (b, i)."""
        rows = self.rows().flatten(1, -2)
        return rows.sum(1, dtype=dtype.sums(rows))

    def example_sums(self, row_layout: RowLayout, n: int) -> Tensor:
        """Σ_t a_{n,t}, shape (b, n, i)."""
        return row_layout.by_example(self.rows(), n, block_axis=0).sum(2)

    @property
    def count(self) -> int:
        """Number of rows in each of the b blocks."""
        return prod(self.lead)

    def gradients(self, left: Tensor, row_layout: RowLayout, n: int) -> Factored:
        """Factored per-example gradients from gradient rows (v, b, n, t, o)."""
        right = row_layout.by_example(self.rows(), n, block_axis=0)
        return Outer(left, right.to(left.dtype))

    def split(self, step: int) -> "Iterator[Inputs] | None":
        """The rows of at most `step` entries of the first leading axis at a time; None: unknown."""
        return None

    def keep(self, live: Tensor) -> "Inputs":
        """The rows of a mask over the leading axes alone; the others become zero."""
        return Masked(self, live)


@dataclass(frozen=True)
class Rows(Inputs):
    """Rows that already exist as a tensor (b, *lead, i)."""

    tensor: Tensor
    droppable = True

    @property
    def key(self) -> Hashable:
        """Where they lie in memory, and how."""
        t = self.tensor
        place = t.untyped_storage()._cdata, t.storage_offset()
        return *place, t.shape, t.stride(), t.dtype, t.device

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return tuple(self.tensor.shape[1:-1])

    def rows(self) -> Tensor:
        """The tensor itself."""
        return accumulable(self.tensor)


@dataclass(frozen=True)
class Ones(Inputs):
    """What a bias meets: a one for each row of its layer."""

    axes: tuple[int, ...]
    like: Tensor
    blocks: int = 1

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.axes

    droppable = True

    def rows(self) -> Tensor:
        """Ones (b, *lead, 1), without memory of their own."""
        return accumulable(self.like.new_ones(())).expand(self.blocks, *self.axes, 1)


@dataclass(frozen=True)
class Masked(Inputs):
    """Rows of which a mask keeps some.

    Args:
        inner: all rows.
        live: mask over the leading axes.
    """

    inner: Inputs
    live: Tensor

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.inner.lead

    def rows(self) -> Tensor:
        """The rows, zero outside the mask."""
        return self.inner.rows() * self.live[..., None]


@dataclass(frozen=True)
class WithOne(Inputs):
    """Rows with a 1 appended, so that the last weight column is the bias."""

    inner: Inputs

    @property
    def droppable(self) -> bool:  # type: ignore[override]
        """As the inner rows."""
        return self.inner.droppable

    @property
    def key(self) -> Hashable | None:
        """That of the inner rows, marked."""
        inner = self.inner.key
        return None if inner is None else ("with one", inner)

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.inner.lead

    def rows(self) -> Tensor:
        """Rows (b, *lead, i + 1)."""
        rows = self.inner.rows()
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)

    def gram(self, dtype: SumDtype, budget: Budget) -> Gram | Tensor:
        """That of rows with their ones, or the inner one with a border."""
        bordered = self.inner.bordered_gram(dtype, budget)
        return super().gram(dtype, budget) if bordered is None else bordered

    def pieces(self, dtype: SumDtype, budget: Budget) -> Iterator[Tensor]:
        """Inner pieces with a 1 appended."""
        for piece in self.inner.pieces(dtype, budget):
            yield torch.cat([piece, piece.new_ones(*piece.shape[:-1], 1)], -1)

    def example_sums(self, row_layout: RowLayout, n: int) -> Tensor:
        """Inner sums with each example's number of rows appended."""
        sums = self.inner.example_sums(row_layout, n)
        ones = sums.new_ones(()).expand(1, *self.lead, 1)
        counts = row_layout.by_example(ones, n, block_axis=0).sum(2)  # (1, n, 1)
        return torch.cat([sums, counts.expand(len(sums), -1, -1)], -1)
