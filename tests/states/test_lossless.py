"""Tensors stored small: every bit comes back, and what can be smaller is."""

from __future__ import annotations

import pytest
import torch

from kfac_laplace.states.lossless import BITS, Small

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def same_bits(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    if one.is_floating_point():
        one, other = (t.contiguous().view(BITS[t.element_size()]) for t in (one, other))
    return torch.equal(one, other)


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(*shape):
    return drawn(*shape) + drawn(*shape).mT


ODD = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 5e-324, 1e-40, 1 / 3])
CASES = {
    "scalar": drawn(),
    "none": drawn(0, 3),
    "no matrices": drawn(0, 3, 3),
    "one by one": drawn(2, 1, 1),
    "vector": drawn(7),
    "matrix": drawn(3, 4),
    "square": drawn(5, 5),
    "symmetric": symmetric(5, 5),
    "some symmetric": symmetric(3, 2, 4, 4),
    "large symmetric": symmetric(700, 700),
    "almost symmetric": symmetric(600, 600).index_put(
        (torch.tensor(590), torch.tensor(580)), torch.tensor(1.0).double()
    ),
    "zeros of two signs": torch.tensor([[1.0, 0.0], [-0.0, 1.0]]).double(),
    "half of its digits": drawn(300).float().double(),
    "one entry wider": torch.cat([torch.ones(5000).double(), drawn(1), torch.ones(5000).double()]),
    "odd values": torch.cat([ODD.double(), drawn(1)]),
    "whole numbers": torch.arange(9),
    "truth": torch.tensor([True, False]),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "transposed": drawn(3, 4).T,
    "expanded": drawn(1, 4).expand(3, 4),
    "with a graph": drawn(3).requires_grad_() * 2,
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit_comes_back(name):
    tensor = CASES[name].detach()
    again = Small.of(CASES[name]).tensor()
    assert same_bits(again, tensor)
    assert again.is_contiguous() and not again.requires_grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].is_floating_point()])
def test_in_every_precision(name, dtype):
    tensor = CASES[name].detach().to(dtype)
    assert same_bits(Small.of(tensor).tensor(), tensor)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(wide, narrow) for wide in FLOATS[:2] for narrow in FLOATS[1:] if wide != narrow],
)
def test_values_of_a_narrower_precision_take_its_room(wide, narrow):
    tensor = drawn(1000).to(narrow).to(wide)
    assert Small.of(tensor).stored.dtype == narrow


def test_symmetric_matrices_take_one_triangle():
    small = Small.of(symmetric(2, 6, 6))
    assert small.stored.shape == (2, 21) and small.rows == 6
    assert Small.of(CASES["almost symmetric"]).rows is None
    assert Small.of(CASES["zeros of two signs"]).rows is None
