"""Tensors that are written into during the forward pass, before and after parameters use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functional import Functional, in_batches, parameter
from laws import assert_dense_structures_are_exact, seeded_case

T, WIDTH, E = 5, 3, 4


def doubled_after_use(m, x):
    w = m.w.clone()
    y = F.linear(x, w)
    w.mul_(2)
    return y.tanh() + F.linear(x, w)


def zeroed_after_use(m, x):
    w = m.w * 1
    y = F.linear(x, w)
    w.zero_()
    return y


def row_overwritten_after_use(m, x):
    w = m.w * 1
    y = F.linear(x, w)
    w[0] = 0
    return y.tanh() + F.linear(x, w)


def row_scaled_before_use(m, x):
    w = m.w.clone()
    w[:2].mul_(3)
    return F.linear(x, w)


def row_of_data_overwritten(m, x):
    y = F.linear(x, m.w) * 1
    y[:, 0] = m.p
    return y.tanh() * m.p


def row_of_data_added_to(m, x):
    y = F.linear(x, m.w) * 1
    y[:, 0] += m.p
    return y


def view_of_data_added_to(m, x):
    y = F.linear(x, m.w) * 1
    y[:, 1:].add_(m.p)
    return y


def output_overwritten(m, x):
    y = F.linear(x, m.w)
    y += m.p
    y[:, 0] = 0
    return y


def data_written_into_a_token(m, x):
    y = torch.stack([m.p] * len(x))
    y[:, :WIDTH] = x[:, 0] - m.q
    return F.linear(x, m.w) + y[:, None]


def data_written_through_a_view(m, x):
    y = torch.stack([m.p] * len(x))
    y[:, :WIDTH].copy_(x[:, 0] - m.q)
    return F.linear(x, m.w) + y[:, None]


def padded_through_a_view(m, x):
    y = torch.zeros(len(x), T + 1, WIDTH, dtype=x.dtype)
    y[:, :T].copy_(x)
    return F.linear(y, m.w) + m.p


def padded_by_hand(m, x):
    y = x.new_zeros(len(x), T + 1, WIDTH)
    y[:, :T] = x
    return F.linear(y, m.w) + m.p


OVERWRITTEN = {
    f.__name__: f
    for f in (
        doubled_after_use,
        zeroed_after_use,
        row_overwritten_after_use,
        row_scaled_before_use,
        row_of_data_overwritten,
        row_of_data_added_to,
        view_of_data_added_to,
        output_overwritten,
        data_written_into_a_token,
        data_written_through_a_view,
        padded_through_a_view,
        padded_by_hand,
    )
}


@pytest.mark.parametrize("sizes", [(3, 3, 1), (1, 3, 3)], ids=["batches", "one first"])
@pytest.mark.parametrize("how", OVERWRITTEN)
def test_tensors_that_are_written_into(how, sizes):
    function = OVERWRITTEN[how]

    def make():
        members = {"w": parameter(E, WIDTH), "p": parameter(E), "q": parameter(WIDTH)}
        return Functional(function, E, **members)

    example = seeded_case(make, (T, WIDTH))
    with torch.no_grad():
        expected = example.model(example.x)
    assert_dense_structures_are_exact(in_batches(example, *sizes))
    assert torch.equal(example.model(example.x), expected)
