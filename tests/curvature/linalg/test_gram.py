"""Gram matrices are the same whether their rows are multiplied out or kept."""

from __future__ import annotations

import pytest
import torch
from cases import build
from laws import fitted, relative_error
from peaks import peak_bytes
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import (
    CACHED_ENTRIES,
    SQUARE_COLUMNS,
    Gram,
    GramSum,
    most_rows,
)
from kfac_laplace.curvature.linalg.spectrum import eigenbasis, eigenvalues

# Sums of some tens of products, in another order.
EXACT = 1e-13
WIDTH = 12
AUTO = SumDtype()


def rows_of(k: int, b: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, k, WIDTH, dtype=dtype)


def gram_of(*parts: Tensor, dtype: SumDtype = AUTO) -> Gram:
    total = GramSum(len(parts[0]), WIDTH, parts[0], dtype)
    for part in parts:
        total.add(part)
    return total.gram()


def exact(*parts: Tensor) -> Tensor:
    rows = torch.cat(parts, 1).double()
    return rows.mT @ rows


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("sizes", [(1,), (2, 3), (6,), (7,), (4, 4), (1, 30, 2), (5, 1, 1)])
def test_kept_or_not_the_matrices_are_the_same(sizes, b):
    torch.manual_seed(0)
    parts = [rows_of(k, b) for k in sizes]
    gram = gram_of(*parts)
    assert (gram.rows.shape[1] == sum(sizes)) == (sum(sizes) <= most_rows(parts[0]))
    assert bool(gram.packed.numel()) == (gram.rows.shape[1] == 0)
    assert relative_error(gram.matrices(), exact(*parts)) < EXACT
    want = torch.linalg.eigvalsh(exact(*parts))
    torch.testing.assert_close(gram.eigenvalues("here"), want.clamp_min(0), rtol=0, atol=1e-12)


def test_float32_rows_are_kept_up_to_the_width():
    assert most_rows(rows_of(1, dtype=torch.float32)) == WIDTH
    assert most_rows(rows_of(1)) == WIDTH // 2
    assert most_rows(torch.ones(1, 3, 1)) == 0  # of one column the sum is smaller


def test_kept_float32_rows_are_multiplied_in_float64():
    torch.manual_seed(0)
    rows = rows_of(5, dtype=torch.float32)
    gram = gram_of(rows)
    assert gram.matrices().dtype == torch.float64
    assert relative_error(gram.matrices(), exact(rows)) < EXACT
    single = gram_of(rows, dtype=SumDtype(torch.float32))
    assert single.matrices().dtype == torch.float32


@pytest.mark.parametrize("second", [0, 2, 5, 30])
@pytest.mark.parametrize("first", [0, 2, 6, 30])
def test_grams_add(first, second):
    """Rows and sums, sums and sums, rows up to their number and beyond."""
    torch.manual_seed(0)
    one, other = rows_of(first, 2), rows_of(second, 2)
    together = gram_of(one) + gram_of(other)
    assert together.rows.shape[1] <= most_rows(one)
    assert relative_error(together.matrices(), exact(one, other), 1e-300) < EXACT


def test_no_rows_are_zeros():
    gram = gram_of(rows_of(0, 2))
    assert torch.equal(gram.matrices(), torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64))
    assert torch.equal(gram.eigenvalues("here"), torch.zeros(2, WIDTH, dtype=torch.float64))


def test_kept_rows_are_copies():
    rows = rows_of(3)
    gram, before = gram_of(rows), exact(rows)
    rows.zero_()
    assert relative_error(gram.matrices(), before) < EXACT


def test_traces():
    parts = [rows_of(2, 2), rows_of(3, 2), rows_of(40, 2)]
    total = GramSum(2, WIDTH, parts[0], SumDtype())
    for k, part in enumerate(parts, start=1):
        total.add(part)
        want = exact(*parts[:k]).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(total.trace(), want)


@pytest.mark.parametrize("dead", [[], [0], [3, 4, 11], range(WIDTH - 1), range(WIDTH)])
def test_units_that_are_always_off_have_eigenvectors_of_their_own(dead):
    """Zeros come first, and values and vectors are in the same order."""
    torch.manual_seed(0)
    rows = rows_of(30, 2)
    rows[..., list(dead)] = 0
    matrices = rows.mT @ rows
    values, vectors = eigenvalues(matrices, "here"), eigenbasis(matrices, "here")
    assert torch.equal(values, values.sort().values)
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, eye)
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, matrices)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_batches_merges_and_one_batch_agree(setting):
    """Wide layers and few examples: rows are kept, folded and merged on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(180, 20), nn.Tanh(),
        nn.Linear(20, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(40, 2, 6, 6).double(), torch.arange(40) % 3
    whole = Curvature(model, "classification", kfac_approx=setting).fit([(x, y)])
    batches = list(zip(x.split(3), y.split(3), strict=True))
    parts = Curvature(model, "classification", kfac_approx=setting).fit(batches[:5])
    parts.merge(Curvature(model, "classification", kfac_approx=setting).fit(batches[5:]))
    for name, block in whole.blocks.items():
        assert relative_error(parts.blocks[name].dense(), block.dense()) < 1e-12
        got, want = parts.blocks[name].eigenvalues(), block.eigenvalues()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(want.max()))


def test_a_block_of_no_data_keeps_its_shape():
    curvature = fitted(build("mlp-tanh"))
    for block in curvature.blocks.values():
        nothing = block.zero()
        assert not nothing.dense().any() and nothing.dense().shape == block.dense().shape
        assert relative_error((block + nothing).dense(), block.dense()) < EXACT


def test_absorbing_changes_nothing_else():
    """A batch is added into its own sums: what was fitted before may be held elsewhere."""
    torch.manual_seed(0)
    for first, second in [(2, 30), (30, 2), (30, 30), (2, 2), (0, 30)]:
        one, other = rows_of(first), rows_of(second)
        before = gram_of(other)
        kept = before.packed.clone(), before.rows.clone()
        mine = gram_of(one)
        total = mine.absorb(before)
        assert relative_error(total.matrices(), exact(one, other)) < EXACT
        assert relative_error(total.absorb(gram_of(one)).matrices(), exact(one, other, one)) < EXACT
        assert torch.equal(before.packed, kept[0]) and torch.equal(before.rows, kept[1])


def chosen_storage(monkeypatch, packed: bool) -> None:
    monkeypatch.setattr("kfac_laplace.curvature.linalg.gram.SQUARE_COLUMNS", 0 if packed else 10**6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("i", [1, 2, 3, 8, 9, 200, 201])
def test_rank_k_updates_of_packed_storage_are_those_of_squares(i, kind, shared, monkeypatch):
    """LAPACK's products straight into the triangle against BLAS's into a square, in any order."""
    torch.manual_seed(0)
    rows = torch.randn(1, 5, 2 * i + 40, i, dtype=kind)
    orders = (rows, rows.mT.contiguous().mT, rows.transpose(1, 2).contiguous().transpose(1, 2))
    eps = torch.finfo(kind if shared else torch.float64).eps
    for given in orders:
        found = {}
        for packed in (True, False):
            chosen_storage(monkeypatch, packed)
            total = GramSum(1, i, given, SumDtype("auto", shared))
            total.add(given)
            total.add(given[:, :2])
            found[packed] = total.total()
            assert found[packed].dtype == torch.float64
            trace = found[packed].diagonal(dim1=-2, dim2=-1).sum(-1)
            torch.testing.assert_close(total.trace(), trace)
            assert torch.equal(total.gram().matrices(), found[packed])
        # The same products, added up in another order: some eps of the largest entry.
        assert relative_error(found[True], found[False]) < 10 * eps
    flat = rows.double().flatten(1, 2)
    more = rows.double()[:, :2].flatten(1, 2)
    assert relative_error(found[True], flat.mT @ flat + more.mT @ more) < 100 * eps


def test_rows_that_become_too_many_are_multiplied_in_either_storage(monkeypatch):
    torch.manual_seed(0)
    parts = [rows_of(4), rows_of(5), rows_of(40)]
    for packed in (True, False):
        chosen_storage(monkeypatch, packed)
        total = gram_of(parts[0])
        for part in parts[1:]:
            total = total.absorb(gram_of(part))
        assert relative_error(total.matrices(), exact(*parts)) < EXACT


@pytest.mark.parametrize("shared", [False, True])
def test_large_sums_never_exist_as_squares(shared):
    """Rows, one triangle, and for products in single precision another in that precision."""
    i = SQUARE_COLUMNS + 1
    rows = torch.randn(1, 2 * i, i)
    triangle = 8 * i * (i + 1) // 2
    total = GramSum(1, i, rows, SumDtype("auto", shared))

    def summed() -> None:
        total.add(rows)
        total.gram()

    # Converted rows stay below the cache's size; the sums of products become float64 at the end.
    spare = 8 * CACHED_ENTRIES + 4096
    assert peak_bytes(summed) <= (1.5 if shared else 1.0) * triangle + spare


def test_nothing_is_added_to_what_was_handed_over():
    total = GramSum(1, WIDTH, rows_of(1), SumDtype())
    total.add(rows_of(30))
    total.gram()
    with pytest.raises(AssertionError, match="belong to a Gram"):
        total.add(rows_of(1))
