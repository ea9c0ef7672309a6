"""Diagonal and full structure, and the generic fallback, against the dense oracle."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import KINDS, build, case
from laws import EXACT, assert_complete, assert_exact_blocks, fitted, relative_error
from torch import nn

CONV_SAMPLE = ("conv-1d-stride-dilation", "conv-2d-groups", "conv-2d-reflect", "conv-3d")


def exact_blocks(example, curvature) -> dict[str, torch.Tensor]:
    return {
        name: oracles.ggn(example.model, *example.data, list(block.params))
        for name, block in curvature.blocks.items()
    }


@pytest.mark.parametrize("name", KINDS + CONV_SAMPLE)
def test_diag_structure_is_the_diagonal_of_the_ggn(name):
    example = build(name)
    curvature = fitted(example, hessian_structure="diag")
    assert_complete(curvature, example.model)
    for key, exact in exact_blocks(example, curvature).items():
        got = curvature.blocks[key].dense()
        assert relative_error(got, exact.diagonal().diag()) < EXACT, key


@pytest.mark.parametrize("name", KINDS + CONV_SAMPLE)
def test_full_structure_is_the_ggn(name):
    example = build(name)
    curvature = fitted(example, hessian_structure="full")
    assert list(curvature.blocks) == ["full"]
    block = curvature.blocks["full"]
    assert sorted(block.params) == sorted(oracles.trainable(example.model))
    exact = oracles.ggn(example.model, *example.data, list(block.params))
    assert relative_error(block.dense(), exact) < EXACT


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_norms_and_positions_have_exact_blocks_under_kron(setting):
    """LayerNorm whole, the position embedding as its diagonal."""
    example = build("vit")
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert curvature.coverage["position"] == "diag"
    assert curvature.coverage["norm.weight"] == curvature.coverage["norm.bias"] == "dense"
    assert list(curvature.blocks["norm.weight"].params) == ["norm.weight", "norm.bias"]
    assert_exact_blocks(example, curvature, ["position", "norm.weight"])


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "cnn", "tokens"])
def test_empirical_fisher_is_the_sum_of_score_outer_products(name, structure):
    example = build(name)
    curvature = fitted(example, hessian_structure=structure, fisher="empirical")
    for key, block in curvature.blocks.items():
        exact = oracles.empirical_fisher(example.model, *example.data, list(block.params))
        if structure == "diag":
            exact = exact.diagonal().diag()
        assert relative_error(block.dense(), exact) < EXACT, key


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_settings_do_not_reach_exact_structures(structure):
    """expand and reduce are two ways to approximate; diag and full need neither."""
    for name in ("cnn", "tokens"):
        expand = fitted(name, hessian_structure=structure, kfac_approx="expand")
        reduce = fitted(name, hessian_structure=structure, kfac_approx="reduce")
        for key, block in expand.blocks.items():
            assert relative_error(reduce.blocks[key].dense(), block.dense()) < EXACT


def test_one_column_outputs_of_regression():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    example = case(model, (3,), "regression")
    curvature = fitted(example, hessian_structure="full")
    exact = oracles.ggn(example.model, *example.data)
    assert relative_error(curvature.blocks["full"].dense(), exact) < EXACT


def test_eigenvalues_are_those_of_the_dense_block():
    for name in ("mlp-tanh", "conv-2d-groups", "vit"):
        for structure in ("kron", "diag", "full"):
            curvature = fitted(name, hessian_structure=structure)
            for block in curvature.blocks.values():
                got = block.eigenvalues().flatten().sort().values
                want = torch.linalg.eigvalsh(block.dense())
                # eigvalsh is accurate to a few ulp of the largest eigenvalue
                assert (got - want).abs().max() < 1e-12 * want.abs().max()
