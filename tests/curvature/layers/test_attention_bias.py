"""Fused attention with parameters among its arguments: biases on the scores, learned queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forms import InForms
from laws import (
    REORDERED,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    fitted,
    seeded_case,
)
from torch import Tensor, nn

OPTIONS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 20).double().reshape(4, 5)},
    "bool mask": {"attn_mask": torch.ones(4, 5, dtype=torch.bool).tril(1)},
    "closed rows": {"attn_mask": torch.ones(4, 5, dtype=torch.bool).tril(-1)},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_form_has_the_values_and_gradients_of_fused_attention(options):
    heads = 2 if "enable_gqa" in options else 4
    q = torch.randn(3, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(3, heads, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    fused = F.scaled_dot_product_attention(q, k, v, **options)
    with InForms() as mode:
        form = F.scaled_dot_product_attention(q, k, v, **options)
    assert mode.replaced == 1
    torch.testing.assert_close(form, fused, rtol=REORDERED, atol=REORDERED)
    weights = torch.randn_like(fused)
    found = [torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (form, fused)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


class Biased(nn.Module):
    """Attention whose scores get a learned bias by relative position, as an additive mask."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 2))
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)
        places = torch.arange(3)
        self.register_buffer("index", places[:, None] - places[None] + 2)

    def forward(self, x: Tensor) -> Tensor:  # (n, 3, 4)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].permute(2, 0, 1).unsqueeze(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class LearnedQueries(nn.Module):
    """Pooling by learned queries, the same for every example."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 4))
        self.kv, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        return self.head(F.scaled_dot_product_attention(self.queries, k, v).flatten(1))


@pytest.mark.parametrize("make", [Biased, LearnedQueries])
def test_parameters_inside_attention_have_rules(make):
    example = seeded_case(make, (3, 4))
    curvature = fitted(example, kfac_approx="expand")
    assert_complete(curvature, example.model)
    assert "generic" not in {group.role for group in curvature.groups}
    if make is Biased:
        assert_diagonal_blocks(example, curvature, ["table"])
    else:  # a product with the keys, row by row
        assert curvature.coverage["queries"] == "kron"
    assert_dense_structures_are_exact(example)
