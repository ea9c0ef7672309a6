"""Bytes of the blocks of many batches, by those of one."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.linalg.gram import most_rows
from kfac_laplace.curvature.linalg.packed import packed_zeros


@dataclass(frozen=True)
class Held:
    """Bytes.

    Args:
        most: at one time, while batches are added.
        end: once all of them are.
    """

    most: int
    end: int


def held(blocks: Mapping[str, Block], batches: int) -> Held:
    """What the blocks of so many batches take.

    Rows that a factor keeps as they are become products once they are many.

    Args:
        blocks: of one batch, with or without numbers.
        batches: how many such batches there are.
    """
    most = end = 0
    for block in blocks.values():
        kept: tuple[str, ...] = ()
        if isinstance(block, KroneckerBlock):
            for packed, rows in (
                (block.input_sum, block.input_rows),
                (block.output_sum, block.output_rows),
            ):
                if packed.ndim == 3:
                    own = _of_sum(packed, rows, batches)
                    most, end = most + own.most, end + own.end
            kept = ("input_rows", "output_rows", "output_sum")
            kept += () if block.has_diagonal_input else ("input_sum",)
        plain = sum(_bytes(t) for name, t in block.tensors().items() if name not in kept)
        most, end = most + plain, end + plain
    return Held(most, end)


def _of_sum(packed: Tensor, rows: Tensor, batches: int) -> Held:
    """A Gram matrix of which each batch adds such a sum, or such rows."""
    b, k, i = rows.shape
    row, room = b * i * rows.element_size(), most_rows(rows)
    square = b * packed_zeros(i, packed.new_empty(0)).numel() * packed.element_size()
    if not k:
        return Held(square, square)
    first = room // k  # batches whose rows are kept together
    if batches <= first:
        size = batches * k * row
        return Held(size, size) if not packed.numel() else Held(size + square, size + square)
    left = batches % (first + 1) * k  # every further one turns all into products
    return Held(square + first * k * row, square + left * row)


def few_rows(packed: Tensor, rows: Tensor, batches: int) -> int | None:
    """How many rows a Gram matrix still keeps as they are after so many batches; None: it does not.

    Args:
        packed: sums of one batch.
        rows: rows of one batch (b, k, i).
        batches: how many such batches there are.
    """
    total = batches * rows.shape[1]
    kept = not packed.numel() and 0 < total <= most_rows(rows)
    return total if kept else None


def late_products(blocks: Mapping[str, Block], batches: int) -> float:
    """Operations that turn the kept rows of so many batches into products, in float64."""
    total = 0.0
    for block in blocks.values():
        if isinstance(block, KroneckerBlock):
            for rows in (block.input_rows, block.output_rows):
                b, k, i = rows.shape
                if k and batches * k > most_rows(rows):
                    total += float(b * batches * k * i * (i + 1))
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
