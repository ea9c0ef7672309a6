"""Layer rules: what a functional call does with its weight, and where to register one."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.precision import accumulable, gram
from kfac_laplace.curvature.sharing import Grouping


class Inputs(ABC):
    """The rows a_{n,t} that meet a weight: one for each example and shared position.

    A rule that can do better than build all rows overrides `gram` and `example_sums`.
    """

    @property
    @abstractmethod
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the rows; the example axis is one of them, alone or flattened."""

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows in at least float32, shape (b, *lead, i)."""

    def gram(self) -> Tensor:
        """Σ_{n,t} a aᵀ, shape (b, i, i)."""
        return gram(self.rows().flatten(1, -2))

    def row_sum(self) -> Tensor:
        """Σ_{n,t} a, shape (b, i)."""
        return self.rows().flatten(1, -2).double().sum(1)

    def example_sums(self, grouping: Grouping, n: int) -> Tensor:
        """Σ_t a_{n,t}, shape (b, n, i)."""
        return grouping.by_example(self.rows(), n, block_axis=0).sum(2)

    @property
    def count(self) -> int:
        """Number of rows in each of the b blocks."""
        return prod(self.lead)


@dataclass(frozen=True)
class Rows(Inputs):
    """Rows that already exist as a tensor (b, *lead, i)."""

    tensor: Tensor

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

    def rows(self) -> Tensor:
        """Ones (b, *lead, 1), without memory of their own."""
        return accumulable(self.like.new_ones(())).expand(self.blocks, *self.axes, 1)


@dataclass(frozen=True)
class WithOne(Inputs):
    """Rows with a 1 appended, so that the last weight column is the bias."""

    inner: Inputs

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return self.inner.lead

    def rows(self) -> Tensor:
        """Rows (b, *lead, i + 1)."""
        rows = self.inner.rows()
        return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1)

    def gram(self) -> Tensor:
        """[[G, s], [sᵀ, count]] from the inner Gram matrix and row sum."""
        return _bordered(self.inner.gram(), self.inner.row_sum(), self.count)

    def example_sums(self, grouping: Grouping, n: int) -> Tensor:
        """Inner sums with the number of rows appended."""
        sums = self.inner.example_sums(grouping, n)
        return torch.cat([sums, sums.new_full((*sums.shape[:-1], 1), self.count / n)], -1)


def _bordered(gram: Tensor, border: Tensor, corner: float) -> Tensor:
    """[[gram, border], [borderᵀ, corner]] for each block, shape (b, i + 1, i + 1)."""
    b, i = border.shape
    out = gram.new_empty(b, i + 1, i + 1)
    out[:, :i, :i] = gram
    out[:, :i, i] = out[:, i, :i] = border
    out[:, i, i] = corner
    return out


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
        kronecker: whether B ⊗ A is the treatment; False asks for an exact diagonal block.
    """

    weight: Tensor
    bias: Tensor | None
    matrix: tuple[int, int, int]
    data: tuple[Tensor, ...]
    inputs: Inputs
    output_rows: Callable[[Tensor], Tensor]
    kronecker: bool = True


Rule = Callable[..., Layer | None]
RULES: dict[Callable[..., Any], Rule] = {}


def layer_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functional calls.

    The rule is called as `rule(output, *args, **kwargs)` with the call's output and its own
    arguments, and describes the call as a `Layer`, or returns None for a call that it does not
    cover.

    Args:
        functions: the functions, as `torch.overrides` sees them (`F.linear`, `F.conv2d`, …).
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register
