"""Low-precision models: their factors are summed in float32 or better."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import Case, build
from laws import fitted, relative_error
from torch import nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import GramSum
from kfac_laplace.errors import InvalidValue

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
REPEATS = 400


def cast(name: str, dtype: torch.dtype) -> Case:
    """The case in another precision; the values survive a trip through bfloat16 unchanged."""
    example = build(name)

    def rounded(t):
        return t.to(torch.bfloat16).to(dtype) if t.is_floating_point() else t

    for parameter in example.model.parameters():
        parameter.data = rounded(parameter.data)
    batches = [(rounded(x), rounded(y)) for x, y in example.batches]
    return Case(example.model, example.likelihood, batches)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "deep-linear-reduce"])
def test_factors_are_float32_or_better(name, dtype):
    curvature = fitted(cast(name, HALF[dtype]))
    for block in curvature.blocks.values():
        for factor in block.factors:
            assert factor.dtype in (torch.float32, torch.float64)
        assert block.dense().dtype in (torch.float32, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_sums_over_many_batches_do_not_stall(structure):
    """A bfloat16 sum stops growing at 256 times its first term; float32 keeps 6 digits."""
    example = cast("mlp-tanh", torch.bfloat16)
    batch = example.batches[0]
    once = fitted(example, [batch], hessian_structure=structure)
    often = fitted(example, [batch] * REPEATS, hessian_structure=structure)
    for name, block in often.blocks.items():
        want = REPEATS * once.blocks[name].dense().double()
        assert relative_error(block.dense().double(), want) < 1e-5


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp-regression", "deep-linear-reduce", "conv-2d-groups"])
def test_sums_over_rows_are_not_rounded_to_half_precision(name, setting):
    """Inputs that bfloat16 holds exactly: the input factor agrees to float32, not to 2 digits."""
    exact = fitted(cast(name, torch.float64), kfac_approx=setting)
    got = fitted(cast(name, torch.bfloat16), kfac_approx=setting).blocks["0.weight"].factors.input
    # float32: a few ulp (1e-7) times the number of terms; bfloat16 would give 1e-3
    assert relative_error(got.double(), exact.blocks["0.weight"].factors.input) < 1e-6


def test_float32_models_agree_with_float64():
    for name in ("mlp-tanh", "conv-2d-groups", "tokens"):
        got, want = fitted(cast(name, torch.float32)), fitted(cast(name, torch.float64))
        for key, block in want.blocks.items():
            assert relative_error(got.blocks[key].dense().double(), block.dense()) < 1e-5


def test_eigenvalues_are_float64():
    for dtype in (torch.float32, torch.bfloat16):
        for block in fitted(cast("mlp-tanh", dtype)).blocks.values():
            assert block.eigenvalues().dtype == torch.float64


def test_half_precision_overflow_is_reported_not_swallowed():
    """float16 ends at 65504: an activation beyond it has to be an error."""
    model = nn.Linear(2, 2).half()
    with torch.no_grad():
        model.weight.fill_(3e4)
    batch = (torch.full((3, 2), 100.0).half(), torch.zeros(3).long())
    with pytest.raises(InvalidValue, match="(?i)finite"):
        fitted(Case(model, "classification", [batch]))


def test_a_callers_autocast_does_not_round_the_factors():
    """Inputs of the first layer are float32: their Gram matrix must not be a bfloat16 product."""
    example = cast("mlp-regression", torch.float32)
    exact = fitted(cast("mlp-regression", torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        curvature = fitted(example)
    for block in curvature.blocks.values():
        assert {factor.dtype for factor in block.factors} <= {torch.float32, torch.float64}
    got = curvature.blocks["0.weight"].factors.input
    assert relative_error(got.double(), exact.blocks["0.weight"].factors.input) < 1e-6


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("dtype", ["auto", torch.float64])
def test_a_callers_autocast_does_not_round_sums_of_convolutions(setting, dtype):
    """The first layer's inputs are float32, and there are channels enough for products by lag."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    batch = (torch.randn(4, 8, 4, 4), torch.arange(4) % 3)
    example = Case(model, "classification", [batch])
    options = {"kfac_approx": setting, "factor_dtype": dtype}
    want = fitted(example, **options).blocks["0.weight"].factors.input
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fitted(example, **options).blocks["0.weight"].factors.input
    # A few eps of float32; bfloat16 would give 1e-3.
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("columns", [1, 256, 257, 600, 1025])
def test_symmetric_products_in_halves(columns):
    rows = torch.randn(2, 5, columns, dtype=torch.float64)
    total = GramSum(2, columns, rows, SumDtype())
    total.add(rows)
    torch.testing.assert_close(total.total(), rows.mT @ rows, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "vit", "mlp-tanh"])
def test_factors_may_be_summed_in_float32(name, setting):
    """Of a float32 model; a float64 model's rows keep their precision."""
    example = build(name)
    model = copy.deepcopy(example.model).float()
    batches = [(x.float(), y) for x, y in example.batches]
    options = {"kfac_approx": setting, "factor_dtype": torch.float32}
    single = Curvature(model, example.likelihood, **options).fit(batches)
    double = Curvature(model, example.likelihood, kfac_approx=setting).fit(batches)
    for weight, block in single.blocks.items():
        assert all(t.dtype == torch.float32 for t in block.factors)
        # Some products of float32 numbers: their rounding errors add up to a few eps.
        floor = 1e-6 * max(b.dense().norm().item() for b in double.blocks.values())
        assert relative_error(block.dense().double(), double.blocks[weight].dense(), floor) < 1e-5
    kept = fitted(example, **options)
    assert all(t.dtype == torch.float64 for b in kept.blocks.values() for t in b.factors)


def test_other_precisions_of_factors_are_refused():
    with pytest.raises(InvalidValue, match="factor_dtype"):
        fitted("cnn", factor_dtype=torch.float16)


def test_the_precision_of_factors_is_stored(tmp_path):
    example = build("cnn")
    la = Laplace(example.model, "classification", factor_dtype=torch.float32)
    la.fit(example.batches).save(tmp_path / "la.pt")
    assert (
        Laplace.load(tmp_path / "la.pt", example.model).curvature.options.factor_dtype
        == torch.float32
    )


def test_stacks_grow_apart_and_together():
    """Parts of a group add to some stacks first and to others later."""
    rows = torch.randn(3, 5, 300, dtype=torch.float64)
    total = GramSum(3, 300, rows, SumDtype())
    total.add(rows[1:2], 1)
    total.add(rows[2:3].expand(1, 2, 5, 300), 2)
    total.add(rows)
    want = rows.mT @ rows * torch.tensor([1.0, 2.0, 3.0]).double()[:, None, None]
    torch.testing.assert_close(total.total(), want, rtol=1e-13, atol=1e-13)


def test_stacks_without_rows_are_zero():
    total = GramSum(2, 3, torch.zeros(()), SumDtype())
    total.add(torch.ones(1, 4, 3), 1)
    assert torch.equal(
        total.total(), torch.tensor([0.0, 4.0]).double()[:, None, None].expand(2, 3, 3)
    )
