"""Multi-head attention in plain calls: its four projections are linear layers.

torch's function packs the projections of queries, keys and values into one weight and hides the
output projection. The form below computes the same values (Vaswani et al. 2017, §3.2) with
`F.linear` on each part, over inputs that keep their axes (l, n, e). Index letters: n example,
h head, l target position, s source position, d entry of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.registry import equivalent_form

#: what the queries, the keys and the values have: inputs, weights or biases
Three = tuple[Tensor, Tensor, Tensor]


@equivalent_form(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """W_o · softmax(q kᵀ/√d + mask) v + b_o over the heads; arguments and values as in torch."""
    batched = query.ndim == 3
    if not batched:
        query, key, value = query[:, None], key[:, None], value[:, None]
    # torch replaces the mask by the hint where it leaves the work to its fused kernel.
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = _mask(None if hinted else attn_mask, key_padding_mask, query.shape[1], num_heads)

    separate = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None
    q, k, v = _project((query, key, value), separate or _thirds(in_proj_weight), in_proj_bias)
    if bias_k is not None and bias_v is not None:  # one more source position for every example
        k = torch.cat([k, bias_k.expand(-1, k.shape[1], -1)])
        v = torch.cat([v, bias_v.expand(-1, v.shape[1], -1)])
    q, k, v = _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)  # (n, h, l, d)
    if static_k is not None:
        k = static_k.unflatten(0, (-1, num_heads))
    if static_v is not None:
        v = static_v.unflatten(0, (-1, num_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    scores = _scores(q, k, mask, causal=hinted)
    weights = scores.softmax(-1) if need_weights else _softmax_or_zero(scores)
    if training and dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    mixed = (weights @ v).permute(2, 0, 1, 3).flatten(2)  # (l, n, e)
    output = F.linear(mixed, out_proj_weight, out_proj_bias)

    if average_attn_weights:
        weights = weights.mean(1)  # (n, l, s)
    if not batched:
        output, weights = output[:, 0], weights[0]
    return output, weights if need_weights else None


def _thirds(packed: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The parts of a packed weight or bias for queries, keys and values."""
    if packed is None:
        return None, None, None
    e = packed.shape[0] // 3
    return packed[:e], packed[e : 2 * e], packed[2 * e :]


def _project(
    inputs: Three, weights: tuple[Tensor | None, ...], packed_bias: Tensor | None
) -> list[Tensor]:
    """Queries (l, n, e), keys and values (s, n, e)."""
    return [
        F.linear(x, weight, bias)  # type: ignore[arg-type]  # None where torch refuses it as well
        for x, weight, bias in zip(inputs, weights, _thirds(packed_bias), strict=True)
    ]


def _heads(projected: Tensor, heads: int) -> Tensor:
    """Positions, examples and heads apart: (l, n, e) to (n, h, l, d)."""
    return projected.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """q kᵀ/√d + mask, (n, h, l, s); appended source positions are open to all targets."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        appended = scores.shape[-1] - mask.shape[-1]
        scores = scores + F.pad(mask, (0, appended)).to(scores.dtype)
    if causal:
        ahead = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return scores


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, n: int, heads: int
) -> Tensor | None:
    """Both masks as one to be added to scores (n, h, l, s), with broadcasting."""
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask)
        if mask.ndim == 3:
            mask = mask.unflatten(0, (n, heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask).reshape(n, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor) -> Tensor:
    """−∞ where a bool mask forbids attention, 0 elsewhere; other masks are additive already."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.get_default_dtype()).masked_fill(mask, -torch.inf)


def _softmax_or_zero(scores: Tensor) -> Tensor:
    """Softmax with zeros in rows that may attend to nothing, as in the fused kernels.

    These rows are taken out first: through 0/0 the derivatives would be NaN.
    """
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


@equivalent_form(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, where parameters enter: learned queries, biases as masks."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = _softmax_or_zero(scores)
    return (F.dropout(weights, dropout_p) if dropout_p > 0 else weights) @ value
