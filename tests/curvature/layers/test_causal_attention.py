"""Rows without influence under fused attention: rounding must not decide which they are.

The first query of causal attention sees one key, so that its weights are one whatever it says.
Fused kernels give it a gradient of zero or of 1e-17, as it happens.
"""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from laws import EXACT, assert_same_blocks, dense_blocks, fitted, relative_error, seeded_case
from torch import Tensor, nn

T, WIDTH, HEADS = 5, 8, 2


class CausalReader(nn.Module):
    """Causal attention by torch's fused function, read at the last token or at every token."""

    def __init__(self, every: bool):
        super().__init__()
        self.every = every
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        read = F.scaled_dot_product_attention(*heads, is_causal=True)
        h = x + self.mix(read.transpose(1, 2).flatten(2)).tanh()
        return self.head(h if self.every else h.square().mean(1))


def reader(every: bool) -> Case:
    return seeded_case(lambda: CausalReader(every), (T, WIDTH))


every_token = pytest.mark.parametrize("every", [True, False], ids=["tokens", "pooled"])


@every_token
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_blocks_do_not_depend_on_the_batches(every, setting):
    example = reader(every)
    want = dense_blocks(fitted(example, [(example.x, example.y)], kfac_approx=setting))
    singly = list(zip(example.x.split(1), example.y.split(1), strict=True))
    for batches in (example.batches, singly):
        got = dense_blocks(fitted(example, batches, kfac_approx=setting))
        assert_same_blocks(got, want, EXACT)


@every_token
def test_the_first_query_is_no_row(every):
    """Its influence is nil by structure: the average runs over the other queries."""
    example = reader(every)
    live = torch.ones(len(example.x), T, dtype=torch.bool)
    live[:, 0] = False
    want = oracles.kfac_factors(example.model, "q", example.data, "expand", live=live)
    got = fitted(example, kfac_approx="expand").blocks["q.weight"]
    assert relative_error(got.dense(), oracles.kfac_block(want, bias_column=True)) < EXACT


def test_the_gradient_of_the_first_query_is_rounding_noise():
    """What makes the other tests worth running: among a few draws the noise is zero and not."""
    found = set()
    for _ in range(50):
        q, k, v = (torch.randn(1, HEADS, T, 4, dtype=torch.float64) for _ in range(3))
        read = F.scaled_dot_product_attention(q.requires_grad_(), k, v, is_causal=True)
        (gradient,) = torch.autograd.grad(read, q, torch.randn_like(read))
        noise, signal = gradient[:, :, 0].abs().max(), gradient[:, :, 1:].abs().max()
        assert noise < 1e-13 * signal
        found.add(bool(noise > 0))
    assert found == {True, False}
