"""The oracles check themselves: two independent routes to the same derivative must meet."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import NAMES, build
from laws import relative_error
from torch import nn


@pytest.mark.parametrize("name", NAMES)
def test_factored_gradients_are_the_jacobian(name):
    """sum_t b a^T, from hooks and patches, equals autograd's Jacobian of the weight."""
    case = build(name)
    layers = [
        layer
        for layer, module in case.model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.weight.requires_grad
    ]
    assert layers
    for layer in layers:
        a, b = oracles.layer_tensors(case.model, layer, *case.data)
        factored = torch.einsum("ntgok,ntgi->nkgoi", b, a).flatten(2)
        exact = oracles.jacobian(case.model, *case.data, [f"{layer}.weight"])
        assert relative_error(factored, exact) < 1e-13


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "tokens"])
def test_output_hessian_is_the_second_derivative_of_the_loss(name):
    case = build(name)
    output = case.model(case.x).detach()
    terms = oracles.terms(output, case.y, case.likelihood)
    shape = (1, *output.shape[1:])

    def loss(f, y):
        return oracles.negative_log_likelihoods(f.reshape(shape), y, case.likelihood).sum()

    want = [
        torch.autograd.functional.hessian(lambda f, y=y: loss(f, y), f.flatten())
        for f, y in zip(terms, case.y.split(1), strict=True)
    ]
    got = oracles.output_hessian(output, case.y, case.likelihood)
    assert relative_error(got, torch.stack(want)) < 1e-13


def test_kfac_block_orders_the_weight_before_the_bias():
    """W is (g o, i): its entries come row by row, then the bias."""
    a = torch.randn(2, 3, 3, dtype=torch.float64)
    b = torch.randn(2, 2, 2, dtype=torch.float64)
    dense = oracles.kfac_block(oracles.Factors(a, b), bias_column=True)
    weight = dense[:8, :8].reshape(2, 2, 2, 2, 2, 2)  # (g, o, i, g, o, i)
    assert torch.allclose(weight[1, 0, 1, 1, 1, 0], b[1, 0, 1] * a[1, 1, 0])
    assert weight[0, :, :, 1].abs().max() == 0
    assert torch.allclose(dense[8:, 8:], torch.block_diag(*(b * a[:, 2:, 2:])))
    assert torch.allclose(dense[1, 8], b[0, 0, 0] * a[0, 1, 2])
