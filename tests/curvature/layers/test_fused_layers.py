"""Blocks of fused calls: those of the linear modules that could stand in their place."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from cases import Case
from forms import DOUBLE, Classifier
from laws import (
    EXACT,
    assert_dense_structures_are_exact,
    assert_exact_blocks,
    assert_kfac_block,
    fitted,
    negligible,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from kfac_laplace.errors import UnsupportedUse

T, WIDTH, HIDDEN = 4, 3, 5


class PlainAttention(nn.Module):
    """nn.MultiheadAttention with one head in linear modules."""

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        width = fused.embed_dim
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        weights, biases = fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3)
        for module, weight, bias in zip((self.q, self.k, self.v), weights, biases, strict=True):
            copy_into(module, weight, bias)
        copy_into(self.o, fused.out_proj.weight, fused.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        return self.o(scores.softmax(-1) @ self.v(x))


class PlainLSTM(nn.Module):
    """nn.LSTM with one layer in linear modules."""

    def __init__(self, fused: nn.LSTM):
        super().__init__()
        self.ih, self.hh = nn.Linear(WIDTH, 4 * HIDDEN), nn.Linear(HIDDEN, 4 * HIDDEN)
        copy_into(self.ih, fused.weight_ih_l0, fused.bias_ih_l0)
        copy_into(self.hh, fused.weight_hh_l0, fused.bias_hh_l0)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        hidden = []
        for step in self.ih(x).unbind(1):
            i, f, g, o = (step + self.hh(h)).split(HIDDEN, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hidden.append(h)
        return torch.stack(hidden, 1)


class First(nn.Module):
    """The first result of a module, of self-attention where the module attends."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.module, nn.MultiheadAttention)
        return self.module(x, x, x)[0] if attends else self.module(x)[0]


def copy_into(module: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)


def twins(fused: nn.Module, plain: Callable[..., nn.Module], width: int) -> tuple[Case, Case]:
    """Classifiers with the same weights and data: with the fused call, and with linear modules."""
    example = seeded_case(lambda: Classifier(First(fused), width), (T, WIDTH))
    model = Classifier(plain(fused), width).to(DOUBLE)
    copy_into(model.head, example.model.head.weight, example.model.head.bias)
    return example, Case(model, example.likelihood, example.batches)


settings = pytest.mark.parametrize("setting", ["expand", "reduce"])


@settings
def test_queries_keys_and_values_have_a_block_each(setting):
    """The packed parameter's block is block-diagonal over its three linear layers."""
    e = WIDTH
    example, twin = twins(nn.MultiheadAttention(e, 1, batch_first=True), PlainAttention, width=e)
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(twin, curvature, "body.o", setting, "body.module.out_proj.weight")
    packed = curvature.blocks["body.module.in_proj_weight"].dense()
    index = torch.arange(3 * e * (e + 1))
    weights, biases = index[: 3 * e * e].chunk(3), index[3 * e * e :].chunk(3)
    expected = torch.zeros_like(packed)
    for layer, weight, bias in zip("qkv", weights, biases, strict=True):
        factors = oracles.kfac_factors(twin.model, f"body.{layer}", twin.data, setting)
        rows = torch.cat([weight, bias])
        expected[rows[:, None], rows] = oracles.kfac_block(factors, bias_column=True)
    assert relative_error(packed, expected, negligible(curvature)) < EXACT


@settings
def test_recurrent_weights_share_over_time(setting):
    """Each time step is one more shared position of the input and the recurrent weight."""
    example, twin = twins(nn.LSTM(WIDTH, HIDDEN, batch_first=True), PlainLSTM, width=HIDDEN)
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(twin, curvature, "body.ih", setting, "body.module.weight_ih_l0")
    assert_kfac_block(twin, curvature, "body.hh", setting, "body.module.weight_hh_l0")


class Packing(nn.Module):
    """Sequences packed up to their last step that is not zero."""

    def __init__(self):
        super().__init__()
        self.network = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x.detach() != 0).any(-1).sum(-1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.network(packed)[1][0].transpose(0, 1)  # the last hidden state


def packed_case(*lengths: list[int]) -> Case:
    """A model that packs, and batches of sequences with these lengths."""
    example = seeded_case(lambda: Classifier(Packing(), HIDDEN), (T, WIDTH))
    for (x, _), batch in zip(example.batches, lengths, strict=False):
        for sequence, length in zip(x, batch, strict=True):
            sequence[length:] = 0
    return example


def test_packed_sequences_have_exact_blocks():
    """Their rows are those of the examples in order of length, which the backend does not know."""
    example = packed_case([2, T, 1], [T, T, T])
    assert_dense_structures_are_exact(example)
    curvature = fitted(example)
    assert_exact_blocks(example, curvature, [n for n in curvature.coverage if "network" in n])


def test_packed_sequences_are_refused_where_the_first_ones_had_one_length():
    """Lengths 4, 1, 1 have as many rows as three sequences of length 2."""
    example = packed_case([T, T, T], [T, 1, 1])
    with pytest.raises(UnsupportedUse, match="packed"):
        fitted(example, subset_of_weights=["*.weight_ih_l0"])
