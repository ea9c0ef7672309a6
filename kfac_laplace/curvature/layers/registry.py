"""Layer rules: what a functional call does with its weight, and where to register one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.settings import Grouping
from kfac_laplace.curvature.linalg.dtypes import accumulable, sum_dtype
from kfac_laplace.curvature.linalg.gram import GramSum
from kfac_laplace.curvature.rows.per_example import Factored, Outer


class Inputs(ABC):
    """The rows a_{n,t} that meet a weight: one for each example and shared position.

    A rule that can do better than build all rows overrides `pieces` or `gram_sum`, and
    `example_sums`.
    """

    #: Whether `gram` gives a diagonal (b, i) instead of a matrix: rows with one entry each.
    diagonal = False
    #: Whether rows that receive no gradient are left out of A: padding, tokens that nothing reads.
    droppable = False

    @property
    @abstractmethod
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the rows; the example axis is one of them, alone or flattened."""

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows in at least float32, shape (b, *lead, i)."""

    def gram(self) -> Tensor:
        """Σ_{n,t} a aᵀ, shape (b, i, i), or its diagonal (b, i) if that is all there is."""
        return self.gram_sum().total()

    def gram_sum(self) -> GramSum:
        """Σ_{n,t} a aᵀ as a sum."""
        total: GramSum | None = None
        for piece in self.pieces():
            if total is None:
                total = GramSum(len(piece), piece.shape[-1], piece)
            total.add(piece)
        assert total is not None
        return total

    def pieces(self) -> Iterator[Tensor]:
        """All rows, some at a time: shape (b, ..., i)."""
        yield self.rows()

    def bordered_gram_sum(self) -> GramSum | None:
        """The Gram matrix of rows with a 1 appended, where there is a better way than pieces."""
        return None

    def row_sum(self) -> Tensor:
        """Σ_{n,t} a, shape (b, i)."""
        rows = self.rows().flatten(1, -2)
        return rows.sum(1, dtype=sum_dtype(rows))

    def example_sums(self, grouping: Grouping, n: int) -> Tensor:
        """Σ_t a_{n,t}, shape (b, n, i)."""
        return grouping.by_example(self.rows(), n, block_axis=0).sum(2)

    @property
    def count(self) -> int:
        """Number of rows in each of the b blocks."""
        return prod(self.lead)

    def gradients(self, left: Tensor, grouping: Grouping, n: int) -> Factored:
        """Factored per-example gradients from gradient rows (v, b, n, t, o)."""
        right = grouping.by_example(self.rows(), n, block_axis=0)
        return Outer(left, right.to(left.dtype))

    def keep(self, live: Tensor) -> "Inputs":
        """The rows of a mask over the leading axes alone; the others become zero."""
        return Masked(self, live)


@dataclass(frozen=True)
class Rows(Inputs):
    """Rows that already exist as a tensor (b, *lead, i)."""

    tensor: Tensor
    droppable = True

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
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.inner.lead

    def rows(self) -> Tensor:
        """Rows (b, *lead, i + 1)."""
        rows = self.inner.rows()
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)

    def gram_sum(self) -> GramSum:
        """That of rows with their ones, or the inner one with a border."""
        bordered = self.inner.bordered_gram_sum()
        return super().gram_sum() if bordered is None else bordered

    def pieces(self) -> Iterator[Tensor]:
        """Inner pieces with a 1 appended."""
        for piece in self.inner.pieces():
            yield torch.cat([piece, piece.new_ones(*piece.shape[:-1], 1)], -1)

    def example_sums(self, grouping: Grouping, n: int) -> Tensor:
        """Inner sums with each example's number of rows appended."""
        sums = self.inner.example_sums(grouping, n)
        ones = sums.new_ones(()).expand(1, *self.lead, 1)
        counts = grouping.by_example(ones, n, block_axis=0).sum(2)  # (1, n, 1)
        return torch.cat([sums, counts.expand(len(sums), -1, -1)], -1)


@dataclass(frozen=True)
class Fold:
    """How a weight becomes matrices: `weight.reshape(split).permute(order).reshape(b, o, i)`.

    Args:
        split: shape into which the weight is reshaped first.
        order: permutation of those axes.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One use of a weight and a bias: output row = W · input row + bias, for each of b blocks.

    Args:
        weight: the weight tensor that the call received.
        bias: its bias, or None.
        matrix: (b, o, i), the weight seen as b matrices.
        data: the tensors through which the graph goes on below this layer.
        inputs: rows that meet the weight.
        output_rows: takes gradients of the call's output (v, *shape) to rows (v, b, *lead, o).
        kronecker: whether B ⊗ A is the treatment; False asks for an exact block.
        covered: whether an exact block is dense where it is small; otherwise it is diagonal, and
            `uncovered` applies to it.
        fold: how the weight becomes its matrices, where a plain reshape does not do it.
    """

    weight: Tensor
    bias: Tensor | None
    matrix: tuple[int, int, int]
    data: tuple[Tensor, ...]
    inputs: Inputs
    output_rows: Callable[[Tensor], Tensor]
    kronecker: bool = True
    covered: bool = True
    fold: Fold | None = None


Registered = TypeVar("Registered", bound=Callable[..., Any])

Rule = Callable[..., Layer | None]
RULES: dict[Callable[..., Any], Rule] = {}

OPERATORS: dict[Callable[..., Any], Rule] = {}

Guard = Callable[..., None]
GUARDS: dict[Callable[..., Any], Guard] = {}

Form = Callable[..., Any]
FORMS: dict[Callable[..., Any], Form] = {}


def _registering(
    table: dict[Callable[..., Any], Registered], functions: tuple[Callable[..., Any], ...]
) -> Callable[[Registered], Registered]:
    """A decorator that enters what it decorates for some functions."""

    def register(entry: Registered) -> Registered:
        table.update(dict.fromkeys(functions, entry))
        return entry

    return register


def layer_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functional calls.

    The rule is called as `rule(output, *args, **kwargs)` with the call's output and its own
    arguments, and describes the call as a `Layer`, or returns None for a call that it does not
    cover.

    Args:
        functions: the functions, as `torch.overrides` sees them (`F.linear`, `F.conv2d`, …).
    """
    return _registering(RULES, functions)


def operator_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for calls that take a weight in any of several places, as operators do.

    The rule is called as `rule(output, weight, *args, **kwargs)`, where `weight` is the one
    argument that is made of tracked parameters, and is a `layer_rule` in all else.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(OPERATORS, functions)


def equivalent_form(*functions: Callable[..., Any]) -> Callable[[Form], Form]:
    """Register a form of a fused call in plain calls, which have rules.

    While uses are recorded, the form runs in place of the call: it takes the same arguments and
    returns the same values.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(FORMS, functions)


def guard(*functions: Callable[..., Any]) -> Callable[[Guard], Guard]:
    """Register a check that runs before every such call, whoever makes it, and may refuse it.

    It is called as `check(with_data, *args, **kwargs)`, where `with_data` says whether an argument
    may differ between examples.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(GUARDS, functions)
