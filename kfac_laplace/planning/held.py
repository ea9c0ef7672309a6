"""Bytes of the blocks of many batches, by those of one."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.estimate.cancellation import EXAMPLES
from kfac_laplace.curvature.estimate.eigen_block import EigenBlock
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
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
            for packed, rows in gram_sides(block):
                own = _of_sum(packed, rows, batches)
                most, end = most + own.most, end + own.end
            for rows, rank in leading_sides(block):
                row = rows[:, :1].numel() * rows.element_size()
                few = min(rank, batches * rows.shape[1]) * row
                most, end = most + few, end + few
            kept = ("input_rows", "output_rows", "output_sum")
            kept += () if block.has_diagonal_input else ("input_sum",)
        plain = sum(_bytes(t) for name, t in block.tensors().items() if name not in kept)
        most, end = most + plain, end + plain
    return Held(most, end)


def gram_sides(block: KroneckerBlock) -> list[tuple[Tensor, Tensor]]:
    """Sums and rows of the factors that are Gram matrices."""
    own = block if isinstance(block, LeadingBlock) else None
    found = []
    if not block.has_diagonal_input and not (own and own.has_wide_input):
        found.append((block.input_sum, block.input_rows))
    if not (own and own.has_wide_output):
        found.append((block.output_sum, block.output_rows))
    return found


def leading_sides(block: KroneckerBlock) -> list[tuple[Tensor, int]]:
    """Rows of the factors that are leading directions, and how many these may be."""
    if not isinstance(block, LeadingBlock):
        return []
    found = [block.input_rows] if block.has_wide_input else []
    found += [block.output_rows] if block.has_wide_output else []
    return [(rows, block.rank) for rows in found]


def _of_sum(packed: Tensor, rows: Tensor, batches: int) -> Held:
    """A Gram matrix of which each batch adds such a sum, or such rows."""
    b, k, i = rows.shape
    row, room = b * i * rows.element_size(), most_rows(rows)
    square = b * packed_zeros(i, packed.new_empty(0)).numel() * packed.element_size()
    if not k:
        return Held(square, square)
    left, late = _kept(packed, rows, batches)
    most = min(batches, room // k) * k * row
    summed = square if late or packed.numel() else 0
    return Held(summed + most, summed + left * row)


def _kept(packed: Tensor, rows: Tensor, batches: int) -> tuple[int, int]:
    """How many rows are left as they are after so many batches, and how many became products."""
    k, together = rows.shape[1], most_rows(rows) // max(1, rows.shape[1])
    if batches <= together:
        return batches * k, 0
    left = batches % (together + 1) * k  # one batch more turns all into products
    return left, batches * k - left


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
            for packed, rows in gram_sides(block):
                b, k, i = rows.shape
                late = _kept(packed, rows, batches)[1] if k else 0
                total += float(b * late * i * (i + 1))
    return total


def more_products(blocks: Mapping[str, Block], few: Mapping[str, Block], n: int) -> float:
    """Operations of sums over the inputs of n examples, where fewer examples' rows are kept.

    Args:
        blocks: of n examples, with or without numbers.
        few: of fewer.
        n: number of examples.
    """
    total = 0.0
    for name, block in blocks.items():
        other = few.get(name)
        if isinstance(block, KroneckerBlock) and isinstance(other, KroneckerBlock):
            b, k, i = other.input_rows.shape
            if k and not block.input_rows.numel():
                rows = n * k / max(1, min(n, EXAMPLES))
                total += b * rows * i * (i + 1)
    return total


def eigenbases_in(blocks: Mapping[str, Block]) -> int:
    """Bytes of the eigenvectors that blocks hold."""
    own = [block for block in blocks.values() if isinstance(block, EigenBlock)]
    return sum(_bytes(block.output_basis) + _bytes(block.input_basis) for block in own)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
