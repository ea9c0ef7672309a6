"""Transposed convolutions: their rows against torch's own values, their blocks by the formulas."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case, Pool, case
from laws import (
    EXACT,
    REORDERED,
    assert_complete,
    assert_dense_structures_are_exact,
    fitted,
    negligible,
    relative_error,
)
from torch import Tensor, nn

from kfac_laplace.curvature.layers import RULES, Layer
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.row_layout import Axis

SETTINGS = ("expand", "reduce")

LAYERS: dict[str, tuple[type[nn.Module], tuple[int, ...], dict]] = {
    # name: (module, input shape without examples, arguments after the channels)
    "1d": (nn.ConvTranspose1d, (2, 4), {"kernel_size": 3}),
    "1d-stride-3-kernel-2": (nn.ConvTranspose1d, (2, 3), {"kernel_size": 2, "stride": 3}),
    "1d-output-padding": (
        nn.ConvTranspose1d,
        (2, 3),
        {"kernel_size": 2, "stride": 3, "output_padding": 2},
    ),
    "1d-dilation": (nn.ConvTranspose1d, (2, 4), {"kernel_size": 3, "dilation": 2}),
    "1d-cropped": (nn.ConvTranspose1d, (2, 5), {"kernel_size": 2, "padding": 2}),
    "1d-one-position": (nn.ConvTranspose1d, (3, 1), {"kernel_size": 1}),
    "2d": (nn.ConvTranspose2d, (2, 3, 2), {"kernel_size": 2}),
    "2d-unet": (nn.ConvTranspose2d, (3, 2, 2), {"kernel_size": 2, "stride": 2}),
    "2d-padding": (
        nn.ConvTranspose2d,
        (2, 3, 3),
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    ),
    "2d-groups": (nn.ConvTranspose2d, (4, 2, 3), {"kernel_size": (2, 3), "groups": 2}),
    "2d-depthwise": (nn.ConvTranspose2d, (4, 2, 2), {"kernel_size": 2, "groups": 4}),
    "2d-mixed": (
        nn.ConvTranspose2d,
        (4, 2, 3),
        {
            "kernel_size": (2, 3),
            "stride": (3, 1),
            "padding": (0, 1),
            "output_padding": (2, 0),
            "dilation": (1, 2),
            "groups": 2,
        },
    ),
    "3d": (nn.ConvTranspose3d, (2, 2, 1, 2), {"kernel_size": 2}),
    "3d-mixed": (
        nn.ConvTranspose3d,
        (2, 2, 2, 1),
        {
            "kernel_size": (1, 2, 3),
            "stride": (2, 2, 1),
            "padding": (0, 1, 1),
            "output_padding": (1, 0, 0),
            "groups": 2,
        },
    ),
}


def layer_of(name: str, n: int = 3) -> tuple[nn.Module, Tensor, Tensor, Layer]:
    """A module of the table, an input, its output, and what the rule says about the call."""
    kind, shape, arguments = LAYERS[name]
    torch.manual_seed(5)
    module = kind(shape[0], 4, **arguments).double()
    x = torch.randn(n, *shape).double()
    return module, x, module(x), described(module, x)


def described(module: nn.Module, x: Tensor) -> Layer:
    """The rule's answer for a module's call."""
    function = getattr(torch, f"conv_transpose{len(module.kernel_size)}d")
    options = ("stride", "padding", "output_padding", "groups", "dilation")
    arguments = [getattr(module, option) for option in options]
    layer = RULES[function](module(x), x, module.weight, module.bias, *arguments)
    assert layer is not None
    return layer


def matrices(layer: Layer, tensor: Tensor) -> Tensor:
    """A weight-shaped tensor as (b, o, i), by the layer's fold."""
    assert layer.fold is not None
    return tensor.reshape(layer.fold.split).permute(layer.fold.order).reshape(layer.matrix)


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_linear_in_its_rows(name):
    """Output rows = W · input rows + bias, in every block."""
    module, _, output, layer = layer_of(name)
    b, o, _ = layer.matrix
    weight = matrices(layer, module.weight)
    bias = module.bias.reshape(b, 1, 1, o)
    rows = torch.einsum("bnti,boi->bnto", layer.inputs.rows(), weight) + bias
    assert relative_error(rows, layer.output_rows(output[None])[0]) < REORDERED
    assert layer.inputs.lead == (3, output[0, 0].numel())


@pytest.mark.parametrize("name", LAYERS)
def test_weight_gradients_come_from_the_rows(name):
    module, _, output, layer = layer_of(name)
    upstream = torch.randn_like(output)
    want, want_bias = torch.autograd.grad(output, (module.weight, module.bias), upstream)
    grads = layer.output_rows(upstream[None])[0]  # (b, n, t, o)
    got = torch.einsum("bnto,bnti->boi", grads, layer.inputs.rows())
    assert relative_error(got, matrices(layer, want)) < REORDERED
    assert relative_error(grads.sum((1, 2)).flatten(), want_bias) < REORDERED


@pytest.mark.parametrize("budget", [1, None])
@pytest.mark.parametrize("name", LAYERS)
def test_sums_without_all_rows_equal_those_over_the_rows(name, budget):
    inputs = layer_of(name)[-1].inputs
    rows = inputs.rows()
    want = torch.einsum("bnti,bntj->bij", rows, rows)
    gram = inputs.gram(SumDtype(), Budget(budget)).matrices()
    assert relative_error(gram, want) < REORDERED
    assert relative_error(inputs.row_sum(SumDtype()), rows.sum((1, 2))) < REORDERED
    assert relative_error(inputs.example_sums(Axis(0), 3), rows.sum(2)) < REORDERED


def test_an_input_without_an_example_axis():
    module, x, _, batched = layer_of("2d-mixed", n=1)
    layer = described(module, x[0])
    upstream = torch.randn_like(module(x[0]))
    assert torch.equal(layer.inputs.rows(), batched.inputs.rows())
    assert torch.equal(layer.output_rows(upstream[None]), batched.output_rows(upstream[None, None]))


def test_positions_of_the_output_padding_alone_are_rows_of_zeros():
    """The bias reaches them, no input does."""
    module, x, output, layer = layer_of("1d-output-padding")
    alone = 2  # the kernel ends where the output padding begins
    assert torch.equal(output[..., -alone:], module.bias[:, None].expand(3, -1, alone))
    backwards = layer.inputs.rows()[0, :, :alone]
    assert not backwards.any()
    assert layer.output_rows(torch.ones_like(output)[None])[0, 0, :, :alone].all()


def net(name: str, first: int | None = None, **options: bool) -> Case:
    """transposed conv -> tanh -> mean pooling -> head, perhaps behind a pointwise layer."""
    kind, shape, arguments = LAYERS[name]
    pointwise = {2: nn.ConvTranspose1d, 3: nn.ConvTranspose2d, 4: nn.ConvTranspose3d}[len(shape)]
    torch.manual_seed(6)
    stem = [pointwise(first, shape[0], 1), nn.Tanh()] if first else []
    axes = tuple(range(2, 1 + len(shape)))
    layer = kind(shape[0], 4, **arguments, **options)
    model = nn.Sequential(*stem, layer, nn.Tanh(), Pool(*axes), nn.Linear(4, 3))
    return case(model, (first or shape[0], *shape[1:]), "classification")


def brute_force_factors(example: Case, place: int, setting: str, joint: bool) -> oracles.Factors:
    """K-FAC factors by hooks and autograd: a row is the Jacobian of one output in the weight."""
    module = example.model[place]
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.extend((args[0].detach(), output))
        return output.clone()

    handle = module.register_forward_hook(keep)
    f = oracles.flat_outputs(example.model, *example.data)
    handle.remove()
    x, output = kept
    columns = [torch.autograd.grad(c, output, retain_graph=True)[0] for c in f.sum(0)]
    g = module.groups
    b = torch.stack([c.flatten(2).mT for c in columns], -1).unflatten(2, (g, -1))  # (n, t, g, o, k)
    first = module(x).flatten(2).unflatten(1, (g, -1))[:, :, 0]  # (n, g, t)
    rows = []
    for group in range(g):
        weights = [
            torch.autograd.grad(entry, module.weight, retain_graph=True)[0]
            for entry in first[:, group].flatten()
        ]
        own = torch.stack(weights).unflatten(1, (g, -1))[:, group, :, 0]  # (n t, i, *kernel)
        rows.append(own.flatten(1).unflatten(0, (len(x), -1)))
    a = torch.stack(rows, 2)  # (n, t, g, i)
    if joint:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    if setting == "reduce":
        a, b = a.mean(1, keepdim=True), b.sum(1, keepdim=True)
    hessian = oracles.output_hessian(example.model(example.x), example.y, example.likelihood)
    return oracles.Factors(
        torch.einsum("ntgi,ntgj->gij", a, a) / (a.shape[0] * a.shape[1]),
        torch.einsum("ntgok,nkl,ntgpl->gop", b, hessian, b),
    )


def dense_block(factors: oracles.Factors, module: nn.Module, joint: bool) -> Tensor:
    """B ⊗ A with rows in the order of the weight (in, out / groups, *kernel), then the bias."""
    dense = oracles.kfac_block(factors)  # (g o i) or, joint, (g o (i + 1))
    size, g = module.weight.numel(), module.groups
    places = torch.arange(size).reshape(module.weight.shape)
    places = places.unflatten(0, (g, -1)).movedim(2, 1).flatten(2)  # (g, o, i)
    if joint:
        biases = torch.arange(size, size + module.out_channels)
        places = torch.cat([places, biases.reshape(g, -1, 1)], -1)
    order = places.flatten().argsort()
    return dense[order][:, order]


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_follow_the_formulas(name, setting, joint):
    example = net(name)
    curvature = fitted(example, kfac_approx=setting, joint_bias=joint)
    assert_complete(curvature, example.model)
    assert curvature.coverage["0.weight"] == curvature.coverage["0.bias"] == "kron"
    factors = brute_force_factors(example, 0, setting, joint)
    block, floor = curvature.blocks["0.weight"], negligible(curvature)
    assert list(block.params) == (["0.weight", "0.bias"] if joint else ["0.weight"])
    assert relative_error(block.factors.input, factors.input) < EXACT
    assert relative_error(block.factors.output, factors.output, floor) < EXACT
    dense = dense_block(factors, example.model[0], joint)
    assert relative_error(block.dense(), dense, floor) < EXACT


@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_alone_is_exact_under_reduce(name):
    example = net(name)
    curvature = fitted(example, kfac_approx="reduce", joint_bias=False)
    exact = oracles.ggn(example.model, *example.data, ["0.bias"])
    assert relative_error(curvature.blocks["0.bias"].dense(), exact) < EXACT


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["1d-output-padding", "2d-mixed", "3d"])
def test_behind_another_transposed_convolution_and_without_a_bias(name, setting):
    example = net(name, first=2, bias=False)
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    for place, joint in ((0, True), (2, False)):
        factors = brute_force_factors(example, place, setting, joint)
        dense = dense_block(factors, example.model[place], joint)
        block = curvature.blocks[f"{place}.weight"]
        assert relative_error(block.dense(), dense, negligible(curvature)) < EXACT


@pytest.mark.parametrize("name", LAYERS)
def test_dense_structures_are_exact(name):
    assert_dense_structures_are_exact(net(name))


def test_a_frozen_bias_leaves_the_weight_alone():
    example = net("2d-mixed")
    example.model[0].bias.requires_grad_(False)
    curvature = fitted(example, kfac_approx="reduce")
    assert_complete(curvature, example.model)
    factors = brute_force_factors(example, 0, "reduce", joint=False)
    dense = dense_block(factors, example.model[0], joint=False)
    assert relative_error(curvature.blocks["0.weight"].dense(), dense) < EXACT
    assert_dense_structures_are_exact(example)


def test_a_frozen_weight_leaves_the_bias_alone():
    example = net("2d-mixed")
    example.model[0].weight.requires_grad_(False)
    curvature = fitted(example, kfac_approx="reduce")
    assert_complete(curvature, example.model)
    exact = oracles.ggn(example.model, *example.data, ["0.bias"])
    assert relative_error(curvature.blocks["0.bias"].dense(), exact) < EXACT
    assert_dense_structures_are_exact(example)
