"""Lookups: a linear layer whose input rows are one-hot, so that A is diagonal."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.registry import (
    Layer,
    guard,
    layer_rule,
    operator_rule,
    repetition_rule,
)
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.inputs import Inputs
from kfac_laplace.curvature.rows.layout import Fold
from kfac_laplace.curvature.rows.per_example import LookedUp
from kfac_laplace.curvature.rows.row_layout import RowLayout
from kfac_laplace.errors import UnsupportedUse


@dataclass(frozen=True)
class OneHot(Inputs):
    """One-hot rows, kept as indices: A is diagonal, the share of rows that look an entry up.

    Under K-FAC-reduce, where means of one-hot rows meet, the diagonal of their Gram matrix is kept
    and co-occurrences are left out: no V × V matrix exists.

    Args:
        index: entry that each row looks up, shape (*lead).
        size: number of entries V.
        live: which rows count, shape (*lead).
    """

    index: Tensor
    size: int
    live: Tensor

    diagonal = True
    droppable = True

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes."""
        return tuple(self.index.shape)

    @property
    def count(self) -> int:
        """Number of rows."""
        return prod(self.lead)

    def rows(self) -> Tensor:
        """The rows in full, shape (1, *lead, V): for tests and small vocabularies."""
        return (F.one_hot(self.index, self.size) * self.live[..., None])[None].double()

    def gram(self, dtype: SumDtype, budget: Budget) -> Tensor:
        """How often each entry is looked up, shape (1, V)."""
        counts = torch.zeros(self.size, dtype=torch.float64, device=self.index.device)
        live = self.live.flatten().double()
        return counts.scatter_add_(0, self.index.flatten().long(), live)[None]

    def example_sums(self, row_layout: RowLayout, n: int) -> Tensor:
        """How often each example looks each entry up, shape (1, n, V)."""
        index = row_layout.by_example(self.index[None, ..., None], n, block_axis=0)[0, ..., 0]
        live = row_layout.by_example(self.live[None, ..., None], n, block_axis=0)[0, ..., 0]
        sums = torch.zeros(n, self.size, dtype=torch.float64, device=index.device)
        return sums.scatter_add_(1, index, live.double())[None]

    def gradients(self, left: Tensor, row_layout: RowLayout, n: int) -> LookedUp:
        """Gradient rows with the entries that they belong to."""
        index = row_layout.by_example(self.index[None, ..., None], n, block_axis=0)[0, ..., 0]
        return LookedUp(left, index, self.size)

    def keep(self, live: Tensor) -> "OneHot":
        """The rows of a mask alone."""
        return OneHot(self.index, self.size, self.live & live)


@guard(F.embedding, F.embedding_bag)
def refuse_renormalisation(with_data: bool, *args: Any, **options: Any) -> None:
    """Raise `UnsupportedUse` for lookups that write into their table."""
    max_norm = options.get("max_norm")
    if max_norm is not None:
        raise UnsupportedUse(
            "an embedding with max_norm rewrites its weight in every forward pass",
            where="embedding",
            got=f"max_norm={max_norm}",
            remedy="Normalise the weight once, and set max_norm to None",
        )


@layer_rule(F.embedding)
def embedding(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Layer:
    """Row `input` of the weight; what looks up the padding entry has no gradient."""
    live = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        live = input != padding_idx % len(weight)
    return _lookup(weight, input.detach(), live)


@operator_rule(Tensor.__getitem__)
def getitem(output: Tensor, weight: Tensor, table: Tensor, index: object) -> Layer | None:
    """table[index] by one tensor of integers."""
    if table is not weight or not isinstance(index, Tensor) or index.dtype != torch.long:
        return None
    index = index.detach() % len(table)
    return _lookup(table, index, torch.ones_like(index, dtype=torch.bool))


@repetition_rule(F.embedding)
def repeated_lookup(
    output: Tensor, n: int, weight: Tensor, index: Tensor, *args: Any, **options: Any
) -> Layer | None:
    """Constant lookups that are the same for each of n examples, or None for others.

    As token types are where a model fills them in. Like other functions of parameters alone they
    get an exact block: in a batch of one example nothing tells that they are repeated.
    """
    if n < 2 or index.ndim < 2 or len(index) != n or not bool((index == index[:1]).all()):
        return None
    layer = embedding(output, index, *args, **options)
    assert layer is not None
    return replace(layer, kronecker=False, covered=False)


def _lookup(weight: Tensor, index: Tensor, live: Tensor) -> Layer:
    size, width = len(weight), prod(weight.shape[1:])
    lead = index.shape

    def output_rows(grad: Tensor) -> Tensor:
        rows = grad.reshape(grad.shape[0], 1, *lead, width)
        return rows * live[..., None]

    return Layer(
        weight=weight,
        bias=None,
        matrix=(1, width, size),
        data=(),
        inputs=OneHot(index.long(), size, live),
        output_rows=output_rows,
        fold=Fold((size, width), (1, 0)),
    )
