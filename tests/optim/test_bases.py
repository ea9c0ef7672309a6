"""Decompositions of factors, and turning matrices into them."""

import pytest
import torch
from optim.problems import SHAPES, factor, factors_of, gradients_of, softmax_factor

from kfac_laplace.optim.bases import Bases, Eigenbases, Side, decompose


def decomposed(*factors, largest=4096, dtype=None):
    return decompose(factors, largest=largest, dtype=dtype)


def assert_decomposes(side, expected, tolerance=1e-12):
    """Q orthonormal and Q diag(values) Qᵀ the factor; float64 rounding of LAPACK by default."""
    identity = torch.eye(expected.shape[-1], dtype=side.vectors.dtype).expand_as(side.vectors)
    again = side.vectors * side.values[:, None, :] @ side.vectors.mT
    scale = float(expected.abs().max())
    torch.testing.assert_close(side.vectors.mT @ side.vectors, identity, rtol=0, atol=tolerance)
    torch.testing.assert_close(again, expected, rtol=0, atol=tolerance * scale)


def test_factors_of_several_groups_and_widths():
    factors = [factor(1, 5), factor(3, 5), factor(2, 7), factor(1, 5)]
    for side, one in zip(decomposed(*factors), factors, strict=True):
        assert_decomposes(side, one)


def test_a_stack_gives_what_each_of_its_groups_gives_alone():
    factors = [factor(2, 6, torch.float32) for _ in range(3)]
    for side, one in zip(decomposed(*factors), factors, strict=True):
        (alone,) = decomposed(one)
        assert torch.equal(side.values, alone.values)
        assert torch.equal(side.vectors, alone.vectors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_factors_have_no_negative_eigenvalue(dtype):
    b = softmax_factor(6, dtype)
    (side,) = decomposed(b)
    assert side.values.min() >= 0
    assert int((side.values > 1e-6).sum()) == 5
    assert_decomposes(side, b, 1e-6 if dtype == torch.float32 else 1e-12)


def test_a_side_of_width_one_is_not_turned():
    (side,) = decomposed(torch.tensor([[[2.0]], [[3.0]]]))
    assert side.vectors is None
    assert side.values.tolist() == [[2.0], [3.0]]


def test_wide_and_diagonal_factors_stay_in_their_own_coordinates():
    wide = factor(2, 6)
    for side in decomposed(wide, wide.diagonal(dim1=1, dim2=2), largest=5):
        assert side.vectors is None
        assert torch.equal(side.values, wide.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("largest", [1, 9])
def test_bases_do_not_follow_a_factor_that_is_changed_in_place(largest):
    changing = factor(1, 4)
    (side,) = decomposed(changing, largest=largest)
    values = side.values.clone()
    changing.mul_(3)
    assert torch.equal(side.values, values)


def test_what_float32_cannot_hold_is_decomposed_in_float64():
    """Entries of 3e38 are finite in float32; their eigenvalue 4 · 3e38 is not."""
    large = torch.full((1, 4, 4), 3e38)
    assert decomposed(large) == [None]  # not even the result fits
    (side,) = decomposed(large, dtype=torch.float64)
    torch.testing.assert_close(side.values[0, -1], large[0, 0, 0].double() * 4, rtol=1e-12, atol=0)
    # of eigenvalues near 1e39, zeros come out as ± 1e23
    assert_decomposes(side, large.double())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("largest", [1, 9])
def test_a_factor_that_is_not_finite_has_no_basis_and_spoils_no_other(bad, largest):
    good, spoilt = factor(1, 4), factor(2, 4)
    spoilt[1, 2, 2] = bad
    first, second, third = decomposed(good, spoilt, 2 * good, largest=largest)
    assert second is None
    for side, one in ((first, good), (third, 2 * good)):
        (alone,) = decomposed(one, largest=largest)
        assert torch.equal(side.values, alone.values)


def test_an_indefinite_factor_has_no_basis():
    assert decomposed(torch.diag_embed(torch.tensor([[1.0, -0.1]]))) == [None]
    assert decomposed(torch.tensor([[1.0, -0.1]])) == [None]


def test_factors_in_half_precision_have_bases_in_float32():
    half = factor(1, 4).to(torch.bfloat16)
    (side,) = decomposed(half)
    assert side.vectors.dtype == torch.float32
    assert_decomposes(side, half.float(), 1e-5)


def some_bases(shapes, largest=4096):
    bases = []
    for b, a in factors_of(shapes).values():
        left, right = decomposed(b, a, largest=largest)
        bases.append(Bases(left, right))
    return bases


def matrix_of(side, b, d):
    return torch.eye(d).double().expand(b, d, d) if side.vectors is None else side.vectors


@pytest.mark.parametrize("largest", [4096, 95, 3, 0])
def test_matrices_are_turned_as_each_group_says(largest):
    """95 leaves the right side of the large group alone, 3 all but the left of the first two."""
    bases, matrices = some_bases(SHAPES, largest), list(gradients_of(SHAPES).values())
    entered = Eigenbases(bases).enter(matrices)
    for one, matrix, found in zip(bases, matrices, entered, strict=True):
        left = matrix_of(one.left, *matrix.shape[:2])
        right = matrix_of(one.right, matrix.shape[0], matrix.shape[2])
        expected = torch.einsum("bpo,bpi,bij->boj", left, matrix, right)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for matrix, again in zip(matrices, Eigenbases(bases).leave(entered), strict=True):
        torch.testing.assert_close(again, matrix, rtol=0, atol=1e-12)


def test_some_groups_alone_are_turned_as_with_the_others():
    bases, matrices = some_bases(SHAPES), list(gradients_of(SHAPES).values())
    entered = Eigenbases(bases).enter(matrices)
    (found,) = Eigenbases(bases).only([1]).enter([matrices[1]])
    torch.testing.assert_close(found, entered[1], rtol=0, atol=1e-13)


def test_nothing_is_turned_or_copied_in_own_coordinates():
    matrix = torch.randn(2, 3, 4)
    own = Bases(Side(torch.ones(2, 3)), Side(torch.ones(2, 4)))
    assert Eigenbases([own]).enter([matrix])[0] is matrix
    assert Eigenbases([own]).leave([matrix])[0] is matrix
    assert Eigenbases([]).enter([]) == []
