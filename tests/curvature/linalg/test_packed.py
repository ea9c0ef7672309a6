"""Symmetric matrices packed into half the memory are all there, and add as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_laplace.curvature.linalg.packed import LEAF, mirror_, pack, size, unpack

# Odd and even, halves that are odd and even, and what is mirrored whole, in halves and in quarters.
SIZES = (1, 2, 3, 4, 5, 7, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF + 1)
STACKS = ((1,), (3,), (2, 3))

sizes = pytest.mark.parametrize("i", SIZES)


def symmetric(*stack: int, i: int) -> Tensor:
    rows = torch.randn(*stack, i, i, dtype=torch.float64)
    return rows + rows.mT


def lower_alone(matrices: Tensor) -> Tensor:
    """The same with NaN above the diagonals."""
    above = torch.ones(matrices.shape[-2:], dtype=torch.bool).triu(1)
    return matrices.masked_fill(above, torch.nan)


@sizes
@pytest.mark.parametrize("stack", STACKS)
def test_unpacking_gives_back_what_was_packed(i, stack):
    matrices = symmetric(*stack, i=i)
    packed = pack(matrices)
    assert packed.shape[:-2] == stack
    assert torch.equal(unpack(packed), matrices)


@sizes
def test_packed_matrices_take_no_entry_too_many(i):
    packed = pack(symmetric(2, i=i))
    assert packed.shape[1:].numel() == i * (i + 1) // 2
    assert packed.is_contiguous() and packed.untyped_storage().nbytes() == 8 * packed.numel()
    assert size(packed) == i


@sizes
def test_entries_above_the_diagonal_do_not_matter(i):
    matrices = symmetric(2, i=i)
    given = lower_alone(matrices)
    before = given.clone()
    packed = pack(given)
    assert torch.equal(packed, pack(matrices))
    assert torch.equal(unpack(packed), matrices)
    assert torch.equal(given.nan_to_num(7.0), before.nan_to_num(7.0)), "the argument was changed"


@sizes
def test_every_entry_of_the_lower_triangle_has_its_own_place(i):
    """The packed entries are a permutation of the lower triangle: none twice, none lost."""
    row, column = torch.tril_indices(i, i)
    numbers = torch.zeros(1, i, i, dtype=torch.float64)
    numbers[0, row, column] = torch.arange(1.0, len(row) + 1, dtype=torch.float64)
    assert torch.equal(pack(numbers).flatten().sort().values, numbers[0, row, column].sort().values)


@sizes
def test_packed_matrices_add_and_scale_as_matrices_do(i):
    one, other = symmetric(2, i=i), symmetric(2, i=i)
    assert torch.equal(unpack(pack(one) + 3 * pack(other)), one + 3 * other)


@sizes
@pytest.mark.parametrize("stack", ((), *STACKS))
def test_mirroring_fills_the_upper_triangle(i, stack):
    matrices = symmetric(*stack, i=i)
    given = matrices.tril() + torch.ones(i, i).triu(1)  # garbage above
    mirror_(given)
    assert torch.equal(given, matrices)


@sizes
def test_mirroring_part_of_a_larger_matrix_leaves_the_rest(i):
    large = symmetric(2, i=i + 2)
    part = large[:, 1:-1, 1:-1]
    want = part.clone()
    part += torch.ones(i, i).triu(1)
    border = large.clone()
    mirror_(part)
    assert torch.equal(part, want)
    border[:, 1:-1, 1:-1] = want
    assert torch.equal(large, border)


@pytest.mark.parametrize("i", [LEAF, LEAF + 1, 2 * LEAF + 1])
def test_infinities_below_the_diagonal_stay_where_they_are(i):
    """Overflow has to be seen, not to spread as NaN."""
    matrices = symmetric(1, i=i)
    matrices[0, i - 1, 0] = matrices[0, 0, i - 1] = torch.inf
    given = matrices.tril()
    mirror_(given)
    assert torch.equal(given, matrices)
    assert torch.equal(unpack(pack(matrices)), matrices)


def test_other_layouts_and_precisions_are_packed_alike():
    matrices = symmetric(2, 3, i=6)
    assert torch.equal(pack(matrices.mT), pack(matrices))
    swapped = matrices.movedim(0, 1)
    assert torch.equal(unpack(pack(swapped)), swapped)
    for dtype in (torch.float32, torch.int64):
        cast = matrices.to(dtype)
        assert pack(cast).dtype == dtype
        assert torch.equal(unpack(pack(cast)), cast)
