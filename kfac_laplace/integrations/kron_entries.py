"""Blocks as entries of laplace-torch's `Kron`: one entry a tensor, exactly or not at all.

An entry of a vector is its matrix. One of a tensor (d, ...) is two factors, d × d and the rest,
whose Kronecker product is the block in the order of the tensor. Entries of batches are added factor
by factor; at the end of a fit the product of the sums has to be the block of all data. Fits that
are added (`override=False`) weigh second factors by their share of the data: these are averages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.errors import UnsupportedUse

ELSEWHERE = "Freeze it, choose hessian_structure='diag', or use kfac_laplace.Laplace"


@dataclass(frozen=True)
class Batch:
    """What of the data a block is.

    Args:
        examples: number of them in the batch.
        total: number of them in the data set.
    """

    examples: int
    total: int


def entry(block: Block, batch: Batch) -> list[Tensor]:
    """The factors of a block of one tensor, in the block's own precision.

    Raises:
        UnsupportedUse: no two factors of the tensor's shape have the block as their product, or
            sums of factors over batches would not.
    """
    (shape,) = block.layout.shapes
    if len(shape) == 1:
        return [_matrix(block)]
    rows, columns = shape[0], shape.numel() // shape[0]
    if isinstance(block, KroneckerBlock):
        return _product(block, (rows, columns), batch)
    if rows == 1:
        return _averaged(torch.ones(1, 1).to(block.dense()), block.dense(), batch, second=True)
    if columns == 1:
        return _averaged(block.dense(), torch.ones(1, 1).to(block.dense()), batch)
    if not any(bool(tensor.any()) for tensor in block.tensors().values()):  # without effect
        found = next(iter(block.tensors().values()))
        return [found.new_zeros(rows, rows), found.new_zeros(columns, columns)]
    raise _refused(block, f"a {block.kind} block is no Kronecker product")


def positions(block: Block, batch: Batch) -> float | None:
    """Rows of A an example, which must be the same in all batches; None where there is no A."""
    if not isinstance(block, KroneckerBlock) or len(block.layout.shapes[0]) == 1:
        return None
    counts = (block.input_count / batch.examples).double()
    if bool((counts - counts[0]).abs().max() > 1e-12 * counts[0]):
        one = f"kfac_approx={{'{block.name}': 'expand'}}"
        one = f"Where 'auto' chose another setting for each, pass {one}. "
        raise _refused(block, "its parts meet different numbers of rows", one)
    return float(counts[0])


def _matrix(block: Block) -> Tensor:
    """The block of a vector, which adds over batches: A of a bias is 1."""
    if isinstance(block, KroneckerBlock):
        ones = block.factors.input
        if bool((ones - 1).abs().max() > 64 * torch.finfo(ones.dtype).eps):
            raise _refused(block, "not all rows of an example count, so that A changes")
    return block.dense()


def _product(block: KroneckerBlock, shape: tuple[int, int], batch: Batch) -> list[Tensor]:
    """B ⊗ A or A ⊗ B, whichever axis of the tensor the outputs lie along."""
    blocks, o, i = block.layout.matrix
    places = block.layout.order.reshape(shape).to(block.output_sum.device)
    outputs, inputs = places // i, places % i  # outputs of all b blocks, one behind the other
    a, b = block.factors
    if block.has_diagonal_input:
        a = a.diag_embed()
    limit = 64 * torch.finfo(a.dtype).eps * a.abs().max()
    if blocks > 1 and bool((a - a[0]).abs().max() > limit):
        raise _refused(block, f"its {blocks} blocks have an A each")
    left, right = torch.block_diag(*b), a[0]
    if _constant(outputs, 1) and _constant(inputs, 0):
        return _averaged(_ordered(left, outputs[:, 0]), _ordered(right, inputs[0]), batch)
    if _constant(outputs, 0) and _constant(inputs, 1):
        first, second = _ordered(right, inputs[:, 0]), _ordered(left, outputs[0])
        return _averaged(first, second, batch, second=True)
    raise _refused(block, "its inputs and outputs do not lie along the first axis and the others")


def _averaged(left: Tensor, right: Tensor, batch: Batch, second: bool = False) -> list[Tensor]:
    """Two factors of which one is a sum and one an average, so that batches add.

    Args:
        left: the first.
        right: the second.
        batch: which share of the data they are of.
        second: the second is the sum, and the first the average. Since it is the second that is
            averaged over fits, the sum is divided by the number of data, the average multiplied.
    """
    if second:
        return [left * batch.examples, right / batch.total]
    return [left, right * (batch.examples / batch.total)]


def _constant(index: Tensor, axis: int) -> bool:
    return bool((index == index.narrow(axis, 0, 1)).all())


def _ordered(matrix: Tensor, index: Tensor) -> Tensor:
    return matrix[index[:, None], index]


def _refused(block: Block, why: str, first: str = "") -> UnsupportedUse:
    """The error for a block that is no entry; `first` is what to try first."""
    shape = tuple(block.layout.shapes[0])
    return UnsupportedUse(
        f"laplace-torch's Kron cannot hold this parameter: {why}",
        where=block.name,
        got=f"shape {shape}",
        remedy=first + ELSEWHERE,
    )
