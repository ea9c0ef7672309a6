"""Multi-head attention in plain calls has the values and gradients of torch's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import DOUBLE, assert_form_is_equivalent, leaf, made
from torch import Tensor, nn

N, L, S, E, HEADS = 3, 2, 4, 6, 2


def bools(*shape: int) -> Tensor:
    """A mask that leaves the first source position open."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "appended bias": {"add_bias_kv": True},
    "appended zeros": {"add_zero_attn": True},
    "separate": {"kdim": 3, "vdim": 5},
    "all": {"kdim": 3, "vdim": 5, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "padding": lambda: {"key_padding_mask": bools(N, S)},
    "float padding": lambda: {"key_padding_mask": torch.randn(N, S, dtype=DOUBLE)},
    "2-D": lambda: {"attn_mask": bools(L, S)},
    "float 2-D": lambda: {"attn_mask": torch.randn(L, S, dtype=DOUBLE)},
    "3-D": lambda: {"attn_mask": bools(N * HEADS, L, S)},
    "float 3-D": lambda: {"attn_mask": torch.randn(N * HEADS, L, S, dtype=DOUBLE)},
    "both": lambda: {"key_padding_mask": bools(N, S), "attn_mask": bools(L, S)},
    "causal": lambda: {"is_causal": True, "attn_mask": causal()},
    "causal, padding": lambda: {
        "is_causal": True,
        "attn_mask": causal(),
        "key_padding_mask": bools(N, S),
    },
}
RESULTS: dict[str, dict[str, Any]] = {
    "no weights": {"need_weights": False},
    "mean weights": {"need_weights": True},
    "all weights": {"need_weights": True, "average_attn_weights": False},
}


def causal() -> Tensor:
    return torch.ones(L, S, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", MODULES)
def test_cross_attention(options, mask, result):
    kind = MODULES[options]
    module = made(nn.MultiheadAttention(E, HEADS, **kind))
    query, key = leaf(L, N, E), leaf(S, N, kind.get("kdim", E))
    value = leaf(S, N, kind.get("vdim", E))
    masks = MASKS[mask]()
    assert_form_is_equivalent(
        lambda: module(query, key, value, **masks, **RESULTS[result]),
        [query, key, value, *module.parameters()],
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("result", RESULTS)
def test_self_attention(result, batch_first):
    module = made(nn.MultiheadAttention(E, HEADS, batch_first=batch_first))
    x = leaf(N, S, E)
    assert_form_is_equivalent(lambda: module(x, x, x, **RESULTS[result]), [x, *module.parameters()])


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("mask", ["none", "key_padding_mask", "attn_mask"])
def test_attention_without_a_batch_axis(mask, result):
    module = made(nn.MultiheadAttention(E, HEADS, add_bias_kv=True))
    query, key = leaf(L, E), leaf(S, E)
    masks = {"none": {}, "key_padding_mask": {mask: bools(S)}, "attn_mask": {mask: causal()}}[mask]
    assert_form_is_equivalent(
        lambda: module(query, key, key, **masks, **RESULTS[result]),
        [query, key, *module.parameters()],
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_positions_that_may_attend_to_nothing(need_weights):
    """torch returns NaN with weights and zeros without; neither reaches the other examples."""
    module = made(nn.MultiheadAttention(E, HEADS))
    query, key = leaf(L, N, E), leaf(S, N, E)
    mask = bools(N, S)
    mask[1] = True
    assert_form_is_equivalent(
        lambda: module(query, key, key, key_padding_mask=mask, need_weights=need_weights),
        [query, key, *module.parameters()],
    )


def test_static_keys_and_values():
    module = made(nn.MultiheadAttention(E, HEADS))
    x, k, v = leaf(L, N, E), leaf(N * HEADS, S, E // HEADS), leaf(N * HEADS, S, E // HEADS)
    packed, out = (module.in_proj_weight, module.in_proj_bias), module.out_proj
    assert_form_is_equivalent(
        lambda: F.multi_head_attention_forward(
            *(x, x, x, E, HEADS, *packed, None, None, False, 0.0, out.weight, out.bias),
            static_k=k,
            static_v=v,
        ),
        [x, k, v, *module.parameters()],
    )


def test_attention_drops_weights_only_in_training():
    module = made(nn.MultiheadAttention(E, HEADS, dropout=1.0))
    x = leaf(S, N, E)
    wrt = [x, *module.parameters()]
    assert_form_is_equivalent(lambda: module(x, x, x), wrt)  # every weight is dropped
    module.eval()
    assert_form_is_equivalent(lambda: module(x, x, x), wrt)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "encoder": nn.TransformerEncoderLayer,
    "decoder": nn.TransformerDecoderLayer,
}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_transformer_layers(kind, norm_first, batch_first):
    options = {"norm_first": norm_first, "batch_first": batch_first}
    layer = made(LAYERS[kind](E, HEADS, 7, **options)).eval()
    x = leaf(*((N, L, E) if batch_first else (L, N, E)))
    inputs = [x] if kind == "encoder" else [x, leaf(*((N, S, E) if batch_first else (S, N, E)))]
    assert_form_is_equivalent(lambda: layer(*inputs), [*inputs, *layer.parameters()])


def test_a_masked_transformer_encoder():
    layer = nn.TransformerEncoderLayer(E, HEADS, 7, batch_first=True)
    encoder = made(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    x, padding = leaf(N, S, E), bools(N, S)
    ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
    assert_form_is_equivalent(
        lambda: encoder(x, mask=ahead, src_key_padding_mask=padding, is_causal=True),
        [x, *encoder.parameters()],
    )
