"""Every Kronecker block against the formulas, by hooks, patches and dense Lambda."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import CONVS, NAMES, Case, build, case, conv_net
from laws import EXACT, fitted, negligible, relative_error
from torch import nn

SETTINGS = ("expand", "reduce")


def kernel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    ]


def assert_blocks_follow_the_formulas(example: Case, curvature, setting: str, joint: bool) -> None:
    """Weight and bias blocks of every linear and conv module, factors and dense."""
    layers = kernel_layers(example.model)
    assert layers
    floor = negligible(curvature)
    for layer, module in layers:
        factors = oracles.kfac_factors(
            example.model, layer, example.data, setting, joint_bias=joint
        )
        trainable_bias = module.bias is not None and module.bias.requires_grad
        if module.weight.requires_grad:
            block = curvature.blocks[f"{layer}.weight"]
            with_bias = trainable_bias and joint
            names = ["weight", "bias"] if with_bias else ["weight"]
            assert list(block.params) == [f"{layer}.{name}" for name in names]
            assert relative_error(block.factors.input, factors.input) < EXACT
            assert relative_error(block.factors.output, factors.output, floor) < EXACT
            dense = oracles.kfac_block(factors, bias_column=with_bias)
            assert relative_error(block.dense(), dense, floor) < EXACT
        elif trainable_bias:
            assert_bias_block(curvature, layer, factors)
        if module.weight.requires_grad and trainable_bias and not joint:
            assert_bias_block(curvature, layer, factors)


def assert_bias_block(curvature, layer: str, factors: oracles.Factors) -> None:
    """A bias alone has the block B; groups one for each (crossed only in the exact GGN)."""
    block = curvature.blocks[f"{layer}.bias"]
    assert list(block.params) == [f"{layer}.bias"]
    if len(factors.output) == 1:
        floor = negligible(curvature)
        assert relative_error(block.dense(), factors.output[0], floor) < EXACT


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_follow_the_formulas(name, setting, joint):
    example = build(name)
    curvature = fitted(example, kfac_approx=setting, joint_bias=joint)
    assert_blocks_follow_the_formulas(example, curvature, setting, joint)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
@pytest.mark.parametrize("name", ["2d-groups", "2d-stride", "1d-same", "3d"])
def test_convolutions_without_a_bias(name, likelihood, setting):
    example = conv_net(name, likelihood, bias=False)
    curvature = fitted(example, kfac_approx=setting)
    assert_blocks_follow_the_formulas(example, curvature, setting, True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", sorted(CONVS))
def test_second_convolution_in_a_stack(name, setting):
    """Inputs that depend on parameters, in front of the layer under test."""
    module, shape, arguments = CONVS[name]
    pointwise = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)](shape[0], shape[0], 1)
    model = nn.Sequential(
        pointwise,
        nn.Tanh(),
        module(shape[0], 4, **arguments),
        nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1),
    )
    model.append(nn.Flatten(1))
    example = case(model, shape, "regression")
    curvature = fitted(example, kfac_approx=setting)
    assert_blocks_follow_the_formulas(example, curvature, setting, True)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own notice
@pytest.mark.parametrize("setting", SETTINGS)
def test_same_padding_with_an_even_kernel_is_lopsided(setting):
    model = nn.Sequential(
        nn.Conv1d(2, 3, 4, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)
    )
    example = case(model, (2, 5), "classification")
    curvature = fitted(example, kfac_approx=setting)
    assert_blocks_follow_the_formulas(example, curvature, setting, True)


@pytest.mark.parametrize("name", ["2d-groups", "2d-depthwise", "3d-replicate-groups"])
def test_groups_have_factors_of_their_own(name):
    """A mean over the groups would pass a test of shapes; here the groups must differ."""
    example = build(f"conv-{name}")
    factors = fitted(example, kfac_approx="reduce").blocks["0.weight"].factors
    groups = example.model[0].groups
    assert len(factors.input) == len(factors.output) == groups
    assert relative_error(factors.output[0], factors.output[1]) > 0.05


@pytest.mark.parametrize("name", ["tokens", "tokens-regression"])
def test_token_outputs_where_layers_mix_tokens(name):
    """One column for all tokens at once leaves cross terms: v's factor would be several x off."""
    example = build(name)
    curvature = fitted(example, kfac_approx="expand", fisher="exact")
    for layer in ("attention.q", "attention.k", "attention.v", "attention.o", "head"):
        factors = oracles.kfac_factors(example.model, layer, example.data, "expand")
        got = curvature.blocks[f"{layer}.weight"].factors.output
        assert relative_error(got, factors.output) < EXACT
    a, b = oracles.layer_tensors(example.model, "attention.v", *example.data)
    tokens = example.x.shape[1]
    summed = b.unflatten(-1, (tokens, -1)).sum(-2)  # all tokens in one pass
    crossed = torch.einsum("ntgok,ntgpk->gop", summed, summed)
    plain = torch.einsum("ntgok,ntgpk->gop", b, b)
    assert relative_error(crossed, plain) > 0.5, "the model does not mix its tokens"


class ClassAxisOne(nn.Module):
    """Dense outputs as torch's losses take them: (n, c, t)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).mT


def test_class_axis_one_is_the_same_as_last():
    last = build("tokens")
    first = Case(ClassAxisOne(last.model), "classification", last.batches)
    want = fitted(last)
    got = fitted(first)
    for name, block in want.blocks.items():
        assert relative_error(got.blocks[f"model.{name}"].dense(), block.dense()) < EXACT


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "cnn", "tokens"])
def test_empirical_fisher_uses_scores(name):
    """Lambda becomes the outer product of the score: no factor 2 for regression."""
    example = build(name)
    f = oracles.flat_outputs(example.model, *example.data).detach().requires_grad_()
    shape = example.model(example.x).shape
    nll = oracles.negative_log_likelihoods(f.reshape(shape), example.y, example.likelihood)
    (score,) = torch.autograd.grad(nll.sum(), f)
    outer = score.unsqueeze(-1) * score.unsqueeze(-2)
    curvature = fitted(example, fisher="empirical")
    for layer, _ in kernel_layers(example.model):
        factors = oracles.kfac_factors(
            example.model, layer, example.data, example.setting, hessian=outer
        )
        block = curvature.blocks[f"{layer}.weight"]
        assert relative_error(block.factors.output, factors.output) < EXACT
        assert relative_error(block.factors.input, factors.input) < EXACT


def test_four_dimensional_inputs_of_a_linear_layer():
    """Any number of shared axes: (n, h, w, i)."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    example = case(model, (2, 3, 3), "classification")
    for setting in SETTINGS:
        curvature = fitted(example, kfac_approx=setting)
        assert_blocks_follow_the_formulas(example, curvature, setting, True)


def test_patches_of_the_oracle_are_those_of_unfold():
    """The oracle's own patches against torch's, for a convolution that F.unfold covers."""
    conv = build("conv-2d-stride").model[0]
    x = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    want = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT
    assert torch.equal(oracles._patches(x, conv), want)
