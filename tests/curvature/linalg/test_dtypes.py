"""Products of shared rows in the rows' own precision, all else and all totals in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, build
from laws import fitted, relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import MANY_ROWS, WHOLE_COLUMNS, GramSum

# Sums of some float32 products, or of many that BLAS adds in blocks: a few eps of 1.2e-7.
SINGLE = 1e-6


class Normalised(nn.Module):
    """LayerNorm before a layer over tokens: its rows lie in a hyperplane, so A has rank i − 1."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(x)).relu().mean(1))


def single(name: str) -> Case:
    """The case with a float32 model and float32 inputs."""
    example = build(name)
    return Case(
        example.model.float(), example.likelihood, [(x.float(), y) for x, y in example.batches]
    )


def assert_identical(got: Curvature, want: Curvature, *names: str) -> None:
    """The raw sums of these blocks (all by default) agree in every bit."""
    for name in names or want.blocks:
        sums = got.blocks[name].tensors()
        for key, tensor in want.blocks[name].tensors().items():
            assert sums[key].dtype == tensor.dtype and torch.equal(sums[key], tensor), name


def test_auto_is_the_default():
    assert Curvature(nn.Linear(2, 2), "classification").options.factor_dtype == "auto"
    assert Laplace(nn.Linear(2, 2)).curvature.options.factor_dtype == "auto"


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "vit", "tokens", "mlp-tanh", "conv-2d-groups", "twice"])
def test_auto_changes_nothing_for_float64_models(name, setting):
    auto = fitted(name, kfac_approx=setting)
    double = fitted(name, kfac_approx=setting, factor_dtype=torch.float64)
    assert_identical(auto, double)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize(
    ("name", "setting"),
    # One row for each example, also where a weight is used twice; or rows summed by example.
    [
        ("mlp-tanh", "expand"),
        ("mlp-regression", "reduce"),
        ("twice", "expand"),
        ("twice", "reduce"),
        ("tokens", "reduce"),
        ("deep-linear-reduce", "reduce"),
    ],
)
def test_auto_changes_nothing_where_rows_are_not_shared(name, setting, structure):
    options = {"kfac_approx": setting, "hessian_structure": structure}
    auto = fitted(single(name), **options)
    double = fitted(single(name), **options, factor_dtype=torch.float64)
    assert_identical(auto, double)


@pytest.mark.parametrize("name", ["cnn", "vit", "tokens", "deep-linear-expand"])
def test_products_of_shared_rows_are_single_and_their_totals_double(name):
    auto = fitted(single(name), kfac_approx="expand")
    double = fitted(single(name), kfac_approx="expand", factor_dtype=torch.float64)
    rounded = False
    for key, block in double.blocks.items():
        if block.kind != "kron":
            continue
        for got, want in zip(auto.blocks[key].factors, block.factors, strict=True):
            assert got.dtype == want.dtype == torch.float64
            assert relative_error(got, want) < SINGLE
            rounded |= not torch.equal(got, want)
    assert rounded, "products were in double after all"


def test_layers_with_one_row_for_each_example_are_not_rounded():
    """So it is for the head behind shared layers."""
    auto = fitted(single("vit"), kfac_approx="expand")
    double = fitted(single("vit"), kfac_approx="expand", factor_dtype=torch.float64)
    assert_identical(auto, double, "head.weight")


@pytest.mark.parametrize("b", [1, 3])
def test_many_rows_are_summed_in_double(b):
    """Several flushes: a float32 total of positive numbers would lose √n eps and more."""
    i, step, steps = 6, MANY_ROWS // 3, 20
    rows = torch.rand(steps, b, step, i) + 1
    total = GramSum(b, i, rows[0], SumDtype("auto", shared=True))
    for some in rows:
        total.add(some)
    flat = rows.movedim(0, 1).flatten(1, 2).double()
    want = flat.mT @ flat
    assert total.total().dtype == torch.float64
    assert relative_error(total.total(), want) < SINGLE
    total.add(rows[0])  # a look in between changes nothing
    want = want + rows[0].double().mT @ rows[0].double()
    assert relative_error(total.total(), want) < SINGLE
    assert torch.equal(total.gram().matrices(), total.total())


@pytest.mark.parametrize("columns", [1, 5, 300])
@pytest.mark.parametrize("chosen", ["auto", torch.float32, torch.float64])
def test_rows_in_any_memory_order_and_stacks_one_by_one(columns, chosen):
    rows = torch.randn(3, 4, 5, columns)
    orders = [rows, rows.mT.contiguous().mT, rows.movedim(0, -2).contiguous().movedim(-2, 0)]
    flat = rows.flatten(1, 2).double()
    want = flat.mT @ flat
    for given in orders:
        total = GramSum(3, columns, given, SumDtype(chosen, shared=True))
        for k in range(3):
            total.add(given[k : k + 1], k)
            total.total()  # a look in between changes nothing
        assert relative_error(total.total().double(), want) < SINGLE


@pytest.mark.parametrize("columns", [5, WHOLE_COLUMNS, WHOLE_COLUMNS + 1, 2 * WHOLE_COLUMNS + 3])
@pytest.mark.parametrize("chosen", ["auto", torch.float64])
def test_products_in_halves_where_blas_has_no_call_for_half_of_one(columns, chosen, monkeypatch):
    """As on GPUs."""
    monkeypatch.setattr("kfac_laplace.curvature.linalg.gram.RANK_K", frozenset())
    rows = torch.randn(1, 4, 5, columns)
    flat = rows[0].flatten(0, 1).double()
    for given in (rows, rows.mT.contiguous().mT, rows[0].flatten(0, 1)[None]):
        total = GramSum(1, columns, given, SumDtype(chosen, shared=True))
        total.add(given)
        total.add(given)
        assert relative_error(total.total()[0], 2 * flat.mT @ flat) < SINGLE


def test_rank_deficient_shared_rows_keep_their_evidence():
    """Null directions of A are zeros up to rounding, also beside a small prior precision."""
    torch.manual_seed(4)
    model = Normalised()
    x, y = torch.randn(40, 12, 24), torch.arange(40) % 3
    evidence = {}
    for dtype in ("auto", torch.float64):
        options = {"kfac_approx": "expand", "prior_precision": 1e-2, "factor_dtype": dtype}
        la = Laplace(model, "classification", **options).fit([(x[:25], y[:25]), (x[25:], y[25:])])
        values = la.curvature.blocks["mix.weight"].eigenvalues()
        assert values.min() >= 0
        evidence[dtype] = float(la.log_marginal_likelihood())
    assert abs(evidence["auto"] - evidence[torch.float64]) < 1e-3 * abs(evidence[torch.float64])
