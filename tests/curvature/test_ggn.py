"""Raw sums and counts: how the data arrive does not change the curvature."""

from __future__ import annotations

import pytest
import torch
from cases import KINDS, N_DATA, build
from laws import REORDERED, assert_complete, assert_same_blocks, dense_blocks, fitted

from kfac_laplace import Curvature

SAMPLE = (*KINDS, "conv-2d-groups", "conv-1d-same")
STRUCTURES = ("kron", "diag", "full")


def options(structure: str) -> dict[str, str]:
    return {"hessian_structure": structure}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SAMPLE)
def test_batch_split_order_and_merge_leave_blocks_unchanged(name, structure):
    example = build(name)
    whole = fitted(example, [(example.x, example.y)], **options(structure))
    want = dense_blocks(whole)
    assert whole.n_data == N_DATA

    split = fitted(example, **options(structure))
    assert split.n_data == N_DATA
    assert_same_blocks(dense_blocks(split), want, REORDERED)

    backwards = [(x.flip(0), y.flip(0)) for x, y in reversed(example.batches)]
    reordered = fitted(example, backwards, **options(structure))
    assert_same_blocks(dense_blocks(reordered), want, REORDERED)

    first = fitted(example, example.batches[:1], **options(structure))
    second = fitted(example, example.batches[1:], **options(structure))
    assert first.merge(second) is first
    assert first.n_data == N_DATA
    assert_same_blocks(dense_blocks(first), want, REORDERED)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "tokens", "vit", "twice"])
def test_both_settings_split_alike(name, setting):
    example = build(name)
    whole = fitted(example, [(example.x, example.y)], kfac_approx=setting)
    split = fitted(example, kfac_approx=setting)
    assert_same_blocks(dense_blocks(split), dense_blocks(whole), REORDERED)


def test_accumulate_is_what_fit_loops_over():
    example = build("mlp-tanh")
    curvature = Curvature(example.model, example.likelihood)
    for x, y in example.batches:
        curvature.accumulate(x, y)
    want = dense_blocks(fitted(example))
    assert_same_blocks(dense_blocks(curvature), want, 0.0)


def test_merge_leaves_the_other_as_it_was():
    example = build("cnn")
    first = fitted(example, example.batches[:1])
    second = fitted(example, example.batches[1:])
    before = dense_blocks(second)
    first.merge(second)
    first.accumulate(*example.batches[0])
    assert_same_blocks(dense_blocks(second), before, 0.0)
    assert second.n_data == N_DATA - len(example.batches[0][0])


def test_a_generator_of_batches_is_a_loader():
    example = build("mlp-tanh")
    curvature = fitted(example, (batch for batch in example.batches))
    assert_same_blocks(dense_blocks(curvature), dense_blocks(fitted(example)), 0.0)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SAMPLE)
def test_no_parameter_is_lost(name, structure):
    example = build(name)
    curvature = fitted(example, **options(structure))
    assert_complete(curvature, example.model)
    kinds = {"kron": {"kron", "dense", "diag"}, "diag": {"diag"}, "full": {"dense"}}[structure]
    for parameter, tensor in example.model.named_parameters():
        kind = curvature.coverage[parameter]
        assert kind in kinds if tensor.requires_grad else kind == "frozen"


def test_blocks_are_symmetric_and_positive():
    for name in SAMPLE:
        for block in fitted(name).blocks.values():
            dense = block.dense()
            scale = dense.abs().max()
            assert (dense - dense.T).abs().max() <= 1e-14 * scale
            assert torch.linalg.eigvalsh(dense)[0] >= -1e-12 * scale
