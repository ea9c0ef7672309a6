"""Where K-FAC is exact (SCIENCE: linear layers with weight sharing), and where it must not be.

Deep linear networks under a Gaussian likelihood: the Jacobian with respect to a layer's outputs
does not depend on the example and Lambda is the identity, so each block is a Kronecker product.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case, MicroViT, Pool, build, case
from laws import EXACT, fitted, negligible, relative_error
from torch import nn

LINEAR = {"deep-linear": "expand", "deep-linear-expand": "expand", "deep-linear-reduce": "reduce"}


def errors(example: Case, **options) -> dict[str, float]:
    """Relative error of each block against the exact GGN block."""
    curvature = fitted(example, **options)
    assert curvature.blocks
    return {
        name: relative_error(
            block.dense(), oracles.ggn(example.model, *example.data, list(block.params))
        )
        for name, block in curvature.blocks.items()
    }


def seeded_case(make, shape: tuple[int, ...], likelihood: str = "regression") -> Case:
    torch.manual_seed(1)
    return case(make(), shape, likelihood)


def circular(channels_in: int, channels_out: int, **options) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode="circular", **options)


def zero_padded() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), Pool(2, 3), nn.Linear(3, 2)
    )


DEEP_LINEAR_CONVS = {
    "circular": (lambda: nn.Sequential(circular(2, 3), circular(3, 2), Pool(2, 3)), (2, 3, 4)),
    "circular-head": (
        lambda: nn.Sequential(circular(1, 3), circular(3, 2), Pool(2, 3), nn.Linear(2, 2)),
        (1, 4, 4),
    ),
    "circular-groups": (
        lambda: nn.Sequential(circular(2, 4), circular(4, 4, groups=2), Pool(2, 3)),
        (2, 4, 3),
    ),
    "1x1": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1), Pool(2, 3), nn.Linear(3, 2)),
        (2, 3, 3),
    ),
    "1d-circular": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular"),
            nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"),
            Pool(2),
        ),
        (2, 5),
    ),
}


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", LINEAR)
def test_deep_linear_network_is_exact_in_its_setting(name, joint_bias):
    found = errors(build(name), kfac_approx=LINEAR[name], joint_bias=joint_bias)
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", LINEAR)
def test_auto_finds_the_exact_setting(name):
    found = errors(build(name), kfac_approx="auto")
    assert max(found.values()) < EXACT, found


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", DEEP_LINEAR_CONVS)
def test_deep_linear_conv_net_is_exact_under_reduce(name, joint_bias):
    found = errors(
        seeded_case(*DEEP_LINEAR_CONVS[name]), kfac_approx="reduce", joint_bias=joint_bias
    )
    assert max(found.values()) < EXACT, found


def test_last_conv_is_exact_whatever_its_padding():
    """Zero padding breaks the theorem for the first convolution, never for the last."""
    found = errors(seeded_case(zero_padded, (2, 4, 4)), kfac_approx="reduce")
    assert found["1.weight"] < EXACT
    assert found["3.weight"] < EXACT
    assert found["0.weight"] > 0.05


def test_reduce_in_the_expand_setting_is_far_off():
    found = errors(build("deep-linear-expand"), kfac_approx="reduce")
    assert min(found.values()) > 0.05, found


def test_expand_in_the_reduce_setting_is_far_off():
    """Layers below the pooling; the head has one position, where the settings coincide."""
    found = errors(build("deep-linear-reduce"), kfac_approx="expand")
    head = "3.weight"
    assert found.pop(head) < EXACT
    assert len(found) == 2
    assert min(found.values()) > 0.05, found


def test_expand_is_far_off_for_pooled_convolutions():
    found = errors(seeded_case(*DEEP_LINEAR_CONVS["circular"]), kfac_approx="expand")
    assert min(found.values()) > 0.05, found


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "mlp-relu-inplace"])
def test_one_position_makes_expand_and_reduce_the_same(name):
    expand = fitted(name, kfac_approx="expand")
    reduce = fitted(name, kfac_approx="reduce")
    for key, block in expand.blocks.items():
        assert relative_error(reduce.blocks[key].dense(), block.dense()) < EXACT


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "mlp-relu-inplace"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_one_example_with_one_position_is_exact_for_any_network(name, setting):
    """N = R = 1: the block is (b Lambda b^T) (x) (a a^T), without an approximation."""
    whole = build(name)
    one = Case(whole.model, whole.likelihood, [(whole.x[:1], whole.y[:1])])
    found = errors(one, kfac_approx=setting)
    assert max(found.values()) < EXACT, found


def test_one_example_gives_a_rank_one_input_factor_under_reduce():
    whole = build("cnn")
    curvature = fitted(whole, [(whole.x[:1], whole.y[:1])], kfac_approx="reduce")
    for block in curvature.blocks.values():
        (factor,) = block.factors.input
        values = torch.linalg.eigvalsh(factor)
        assert values[-1] > 1e-6
        assert values[:-1].abs().max() < 1e-13 * values[-1]
    # C - 1 backward vectors for one example bound the rank of every output factor.
    for block in curvature.blocks.values():
        assert int((torch.linalg.eigvalsh(block.factors.output[0]) > 1e-12).sum()) <= 2


@pytest.mark.parametrize("name", ["cnn", "vit", "conv-2d-stride", "conv-3d", "conv-2d-groups"])
def test_separate_bias_under_reduce_is_exact_for_any_network(name):
    """df/db = sum_r b_r, so the bias block is the exact GGN: an oracle that costs nothing."""
    example = build(name)
    curvature = fitted(example, kfac_approx="reduce", joint_bias=False, fisher="exact")
    biases = [
        f"{layer}.bias"
        for layer, module in example.model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is not None
    ]
    assert len(biases) >= 2
    for bias in biases:
        block = curvature.blocks[bias]
        assert tuple(block.params) == (bias,)
        exact = oracles.ggn(example.model, *example.data, [bias])
        assert relative_error(block.dense(), exact, negligible(curvature)) < EXACT, bias


def test_bias_under_expand_is_not_exact_for_a_pooled_network():
    """The counterpart: without reduce the same block is far off."""
    example = seeded_case(MicroViT, (1, 4, 4), "classification")
    curvature = fitted(example, kfac_approx="expand", joint_bias=False)
    exact = oracles.ggn(example.model, *example.data, ["attention.o.bias"])
    assert relative_error(curvature.blocks["attention.o.bias"].dense(), exact) > 0.05
