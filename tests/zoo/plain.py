"""Fused modules spelt out with one `nn.Linear` for each product, for hooks to see.

`plain_copy` returns a twin of a model with the same values; parameters that a fused module packs
into one tensor are several tensors there.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` with separate projections; masks are added to the scores."""

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        assert fused._qkv_same_embed_dim and fused.bias_k is None and not fused.add_zero_attn
        self.heads, self.batch_first = fused.num_heads, fused.batch_first
        weights, biases = fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3)
        self.q, self.k, self.v = map(_linear, weights, biases)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **_options: bool,
    ) -> tuple[Tensor, None]:
        assert not need_weights
        n, t = (0, 1) if self.batch_first else (1, 0)
        q, k, v = (
            layer(x).movedim((n, t), (0, 1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )  # (n, h, t, d)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if key_padding_mask is not None:
            scores = scores + key_padding_mask[:, None, None]  # 0 or -inf
        if attn_mask is not None:
            scores = scores + attn_mask  # the same
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (n, t, e)
        return self.out_proj(mixed.movedim((0, 1), (n, t))), None

    @staticmethod
    def sources() -> dict[str, list[str]]:
        """Parameters of the fused module and where they are here, part after part."""
        return {
            f"in_proj_{kind}": [f"{part}.{kind}" for part in "qkv"] for kind in ("weight", "bias")
        }


class PlainLSTM(nn.Module):
    """`nn.LSTM` in one direction, step by step."""

    def __init__(self, fused: nn.LSTM):
        super().__init__()
        assert fused.batch_first and not fused.bidirectional and not fused.proj_size
        self.layers = fused.num_layers
        for layer in range(self.layers):
            for kind in ("ih", "hh"):
                weight, bias = (getattr(fused, f"{p}_{kind}_l{layer}") for p in ("weight", "bias"))
                self.add_module(f"{kind}_l{layer}", _linear(weight, bias))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        for layer in range(self.layers):
            h = c = torch.zeros((), dtype=x.dtype)
            ih, hh = (self.get_submodule(f"{kind}_l{layer}") for kind in ("ih", "hh"))
            hidden = []
            for step in ih(x).unbind(1):  # (n, 4 h)
                h = h.expand(len(x), hh.in_features)
                i, f, g, o = (step + hh(h)).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                hidden.append(h)
            x = torch.stack(hidden, 1)
        return x, None

    def sources(self) -> dict[str, list[str]]:
        """Parameters of the fused module and where they are here."""
        return {
            f"{parameter}_{kind}_l{layer}": [f"{kind}_l{layer}.{parameter}"]
            for layer in range(self.layers)
            for kind in ("ih", "hh")
            for parameter in ("weight", "bias")
        }


FORMS = {nn.MultiheadAttention: PlainAttention, nn.LSTM: PlainLSTM}


def plain_copy(model: nn.Module) -> tuple[nn.Module, dict[str, list[str]]]:
    """A twin without fused modules.

    Returns:
        The twin, and where each parameter of the model is in it: the names of its equal parts
        along the first axis, in order.
    """
    twin = copy.deepcopy(model)
    places = {name: [name] for name, _ in model.named_parameters()}
    for prefix, fused in list(twin.named_modules()):
        if type(fused) in FORMS:
            plain = FORMS[type(fused)](fused)
            parent, _, child = prefix.rpartition(".")
            twin.get_submodule(parent).register_module(child, plain)
            for name, parts in plain.sources().items():
                places[f"{prefix}.{name}"] = [f"{prefix}.{part}" for part in parts]
    return twin, places


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1], dtype=weight.dtype)
    layer.weight, layer.bias = (nn.Parameter(t.detach().clone()) for t in (weight, bias))
    return layer
