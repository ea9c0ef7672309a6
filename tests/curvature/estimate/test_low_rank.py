"""The low-rank structure: exact where the rank is no less than the rows, bounded where it is."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from cases import build
from laws import EXACT, REORDERED, Untouched, fitted, relative_error
from peaks import peak_bytes
from torch import nn

from kfac_laplace import Curvature, Hybrid, LowRank, MonteCarlo
from kfac_laplace.curvature.estimate.finite import not_finite
from kfac_laplace.curvature.linalg.leading import combined, inner, leading

NAME = "lowrank"
CASES = ["mlp-tanh", "mlp-regression", "mlp-binary", "cnn", "vit", "tokens", "twice"]
cases = pytest.mark.parametrize("name", CASES)


def low(name, rank=1000, batches=None, **options):
    """The one block of a case, and its curvature."""
    curvature = fitted(name, batches, hessian_structure=LowRank(rank), **options)
    return curvature.blocks[NAME], curvature


def exact(name):
    """The dense GGN of a case, by autograd."""
    case = build(name)
    return oracles.ggn(case.model, *case.data, [n for n, _ in case.model.named_parameters()])


# --- without truncation --------------------------------------------------------------------------


@cases
def test_with_a_rank_for_every_row_it_is_the_ggn(name):
    case, want = build(name), exact(name)
    untouched = Untouched(case.model)
    block = fitted(case, hessian_structure=LowRank(1000)).blocks[NAME]
    untouched.check()
    assert relative_error(block.dense(), want) < EXACT
    assert float(block.dropped) == 0 and block.share == 1
    assert len(block.rows) <= len(want)


@pytest.mark.parametrize("fisher", [MonteCarlo(2), Hybrid(passes=2), "empirical"])
@pytest.mark.parametrize("name", ["mlp-tanh", "tokens"])
def test_any_estimator_gives_the_rows_that_full_sums(name, fisher):
    got = low(name, fisher=fisher)[0].dense()
    want = fitted(name, hessian_structure="full", fisher=fisher).blocks["full"].dense()
    assert relative_error(got, want) < REORDERED


@cases
def test_any_split_into_batches_gives_the_same(name):
    case = build(name)
    want = low(name)[0].dense()
    for sizes in ((7,), (1,) * 7, (2, 5), (5, 2)):
        pairs = [*zip(case.x.split(sizes), case.y.split(sizes), strict=True)]
        assert relative_error(low(name, batches=pairs)[0].dense(), want) < REORDERED


def test_merges_in_any_order_give_the_same():
    parts = [low("cnn", batches=[batch])[1].ggn for batch in build("cnn").batches]
    want = low("cnn")[0].dense()
    for one, two, three in itertools.permutations(parts):
        for total in ((one + two) + three, one + (two + three)):
            assert relative_error(total.blocks[NAME].dense(), want) < REORDERED


def test_fewer_parameters_than_rows_leave_no_more_rows_than_these():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    curvature = Curvature(model, "regression", hessian_structure=LowRank(1000))
    curvature.fit([(x[:33], y[:33]), (x[33:], y[33:])])
    block = curvature.blocks[NAME]
    assert block.rows.shape == (8, 8)
    rows = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    gram = rows.mT @ rows  # (inputs and 1), of each output
    own = torch.block_diag(gram, gram)
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])
    assert relative_error(block.dense(), own[order[:, None], order]) < EXACT
    assert float(block.dropped) <= 1e-12 * float(block.dense().trace())


# --- with truncation -----------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_what_is_dropped_bounds_the_error_from_above(name, rank):
    """0 ≤ H − RᵀR, its trace is `dropped`, and so its spectral norm is no larger."""
    want, (block, _) = exact(name), low(name, rank)
    assert len(block.rows) == rank
    rest = want - block.dense()
    values = torch.linalg.eigvalsh(rest)
    rounding = 1e-12 * float(want.trace())
    assert float(values[0]) >= -rounding
    assert float(values[-1]) <= float(block.dropped) + rounding
    torch.testing.assert_close(rest.trace(), block.dropped, rtol=1e-9, atol=rounding)
    held = float(block.dense().trace() / want.trace())
    assert block.share == pytest.approx(held, rel=1e-9)


@cases
def test_of_one_batch_no_other_rows_of_this_number_are_nearer(name):
    """Eckart and Young: the error is the sum of the smallest eigenvalues."""
    case, want = build(name), exact(name)
    block = low(name, 4, [(case.x, case.y)])[0]
    values = torch.linalg.eigvalsh(want)
    if name != "tokens":  # whose rows come in several pieces
        torch.testing.assert_close(block.dropped, values[:-4].sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(block.eigenvalues()[-4:], values[-4:], rtol=1e-9, atol=1e-12)
    products = block.rows @ block.rows.mT
    rest = products - products.diagonal().diag()
    assert float(rest.abs().max()) < 1e-12 * float(products.norm())  # orthogonal


def test_every_order_of_merges_keeps_the_bound():
    parts = [low("cnn", 3, [batch])[1].ggn for batch in build("cnn").batches]
    want = exact("cnn")
    for one, two, three in itertools.permutations(parts):
        for total in ((one + two) + three, one + (two + three)):
            block = total.blocks[NAME]
            values = torch.linalg.eigvalsh(want - block.dense())
            assert -1e-12 < float(values[0]) <= float(values[-1]) <= float(block.dropped) + 1e-12
            torch.testing.assert_close(block.dense().trace() + block.dropped, want.trace())


def test_rows_of_a_batch_come_in_pieces():
    """Not all 4,000 at once, but twice the rank and those of a vector, and these in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 20), nn.Tanh(), nn.Linear(20, 100))
    x, y = torch.randn(40, 60), torch.randn(40, 100)
    curvature = Curvature(model, "regression", hessian_structure=LowRank(20))
    curvature.accumulate(x[:2], y[:2])  # what a first batch alone looks at
    row = 4 * sum(p.numel() for p in model.parameters())
    peak = peak_bytes(lambda: curvature.accumulate(x, y))
    assert peak < 4000 * row / 5


# --- the algebra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(9,), (4, 5), (1, 0, 8)])
def test_leading_directions_are_those_of_the_svd(sizes, dtype):
    torch.manual_seed(3)
    rows = torch.randn(9, 30, dtype=dtype)
    u, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    found, lost = leading(list(rows.split(sizes)), 4, torch.float64)
    assert found.dtype == dtype and found.shape == (4, 30)
    want = vh[:4].mT * s[:4] ** 2 @ vh[:4]
    tolerance = EXACT if dtype == torch.float64 else 1e-6
    assert relative_error(found.double().mT @ found.double(), want) < tolerance
    torch.testing.assert_close(lost, s[4:].square().sum())


def test_few_rows_come_as_they_are():
    rows = torch.randn(3, 5)
    found, lost = leading([rows[:1], rows[1:]], 3, torch.float64)
    assert torch.equal(found, rows) and float(lost) == 0


@pytest.mark.parametrize("columns", [7, 2**20 + 2**19])
def test_products_of_two_precisions_are_in_that_of_the_other_side(columns):
    torch.manual_seed(1)
    rows = torch.randn(3, columns)
    vectors, weights = torch.randn(2, columns).double(), torch.randn(2, 3).double()
    torch.testing.assert_close(inner(vectors, rows), vectors @ rows.double().mT)
    torch.testing.assert_close(combined(weights, rows), weights @ rows.double())


def test_a_block_scales_and_empties_as_the_sum_does():
    block, curvature = low("vit", 5)
    torch.testing.assert_close(block.scaled(0.3).dense(), 0.3 * block.dense())
    torch.testing.assert_close(block.scaled(0.3).dropped, 0.3 * block.dropped)
    none = block.zero()
    assert none.rows.shape == (0, block.layout.size) and float(none.dropped) == 0
    assert not none.dense().any() and none.share == 1 and not_finite({"": none}) is None
    torch.testing.assert_close((none + block).dense(), block.dense())
    average = curvature.ggn.scaled(0.9) + curvature.ggn
    torch.testing.assert_close(average.blocks[NAME].dense(), 1.9 * block.dense())


def test_adding_leaves_both_as_they_were():
    one, other = (low("vit", 5, [batch])[0] for batch in build("vit").batches[:2])
    before = [block.rows.clone() for block in (one, other)]
    one + other
    assert all(map(torch.equal, before, (one.rows, other.rows)))


@pytest.mark.parametrize("rank", [3, 1000])
def test_eigenvalues_are_those_of_the_matrix(rank):
    block = low("mlp-tanh", rank)[0]
    want = torch.linalg.eigvalsh(block.dense())
    torch.testing.assert_close(block.eigenvalues(), want, rtol=1e-9, atol=1e-12)
    left, right = block.spectrum.bases
    again = right[0] * block.spectrum.values[0, 0] @ right[0].mT
    torch.testing.assert_close(again, block.dense())
    assert left.shape == (1, 1, 1)


def test_tensors_make_the_block_again():
    block = low("mlp-tanh", 4)[0]
    again = type(block).from_tensors(block.layout, block.tensors(), block.rank)
    assert torch.equal(again.rows, block.rows) and again.rank == 4
    assert set(block.tensors()) == {"rows", "dropped"}


def test_float32_models_have_rows_in_float32():
    case = build("mlp-tanh")
    model, batches = case.model.float(), [(x.float(), y) for x, y in case.batches]
    curvature = Curvature(model, case.likelihood, hessian_structure=LowRank(6)).fit(batches)
    block = curvature.blocks[NAME]
    assert block.rows.dtype == torch.float32 and block.dropped.dtype == torch.float64
    want = exact("mlp-tanh")
    torch.testing.assert_close(block.dense().trace() + block.dropped, want.trace(), rtol=1e-5,
                               atol=0)  # fmt: skip
    assert float(torch.linalg.eigvalsh(want - block.dense())[0]) > -1e-5 * float(want.trace())


class Partly(nn.Module):
    """With a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_parameters_without_effect_have_zeros_in_every_row():
    torch.manual_seed(0)
    x, y = torch.randn(9, 3), torch.randint(2, (9,))
    few = LowRank(2)
    curvature = Curvature(Partly(), "classification", hessian_structure=few).fit([(x, y)])
    assert curvature.coverage["spare.weight"] == "unused"
    assert curvature.coverage["used.weight"] == NAME
    assert not curvature.blocks[NAME].rows[:, 8:].any()


def test_ignored_labels_alone_are_no_rows():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    curvature = Curvature(nn.Linear(3, 2), "classification", hessian_structure=NAME)
    curvature.accumulate(x, torch.full((4,), -100))
    assert len(curvature.blocks[NAME].rows) == 0
    curvature.accumulate(x, y)
    assert len(curvature.blocks[NAME].rows) == 4
