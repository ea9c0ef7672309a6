"""Parameters that are added, multiplied, repeated or looked up beside the data: exact diagonals."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from functional import Functional, in_batches, parameter
from laws import (
    REORDERED,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_same_blocks,
    dense_blocks,
    fitted,
    seeded_case,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

T, WIDTH, E, H = 4, 3, 4, 2
SPLITS = ((1, 3, 3), (1,) * 7, (2, 5))


class Through(torch.autograd.Function):
    """The identity, which hides from the recorder what goes through it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def mixed(x: Tensor) -> Tensor:
    """Self-attention without weights: every token sees every other."""
    return x + (x @ x.mT).softmax(-1) @ x


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def distances() -> Tensor:
    """Index of the relative position of two tokens, (t, t)."""
    place = torch.arange(T)
    return place[:, None] - place + T - 1


def attended(x: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias (h, t, t) or (1, h, t, t) on its scores, (n, t, e)."""
    x = heads(x)
    scores = x @ x.mT + bias
    return (scores.softmax(-1) @ x).transpose(1, 2).flatten(2)


def windowed(x: Tensor, token: Tensor) -> Tensor:
    """A token for each of two windows of an example."""
    x = x.reshape(-1, T // 2, E)
    x = mixed(torch.cat([token.expand(len(x), -1, -1), x], 1))
    return x.reshape(-1, T + 2, E)


def added_in_place(x: Tensor, p: Tensor) -> Tensor:
    x = x * 1
    x += p
    x += p.square()
    return x


def checkpointed(x: Tensor, p: Tensor) -> Tensor:
    return checkpoint(lambda z: (z + p).tanh() * p.exp(), x, use_reentrant=False)


def without_gradient(x: Tensor, p: Tensor) -> Tensor:
    with torch.no_grad():
        shift = x * p
    return x * p.detach() + shift + p


def filled(x: Tensor, p: Tensor) -> Tensor:
    """A token in place of the masked ones."""
    return torch.where(x[..., :1] > 0, x, p)


#: name -> (shape of the parameter p, function of tokens x (n, t, e) and p)
USES = {
    "positions": ((1, T, E), lambda x, p: x + p),
    "first positions": ((1, T + 2, E), lambda x, p: x + p[:, :T]),
    "positions looked up": ((T + 2, E), lambda x, p: x + F.embedding(torch.arange(T)[None], p)),
    "looked up by example": (
        (T, E),
        lambda x, p: x + p[torch.arange(T).expand(x.shape[:2])],
    ),
    "positions interpolated": (
        (1, 3, E),
        lambda x, p: x + F.interpolate(p.mT, size=T, mode="linear").mT,
    ),
    "indexed table": (
        (2 * T - 1, H),
        lambda x, p: attended(x, p[distances().flatten()].view(T, T, H).permute(2, 0, 1)[None]),
    ),
    "embedded table": (
        (2 * T - 1, H),
        lambda x, p: attended(x, F.embedding(distances(), p).permute(2, 0, 1)),
    ),
    "table and mask": (
        (2 * T - 1, H),
        lambda x, p: attended(
            x, F.embedding(distances(), p).permute(2, 0, 1) - (x[:, None, None, :, 0] > 0) * 1.0
        ),
    ),
    "token expanded": ((1, 1, E), lambda x, p: mixed(torch.cat([p.expand(len(x), -1, -1), x], 1))),
    "token repeated": ((1, 1, E), lambda x, p: mixed(torch.cat([p.repeat(len(x), 1, 1), x], 1))),
    "token broadcast": (
        (E,),
        lambda x, p: mixed(torch.cat([torch.broadcast_to(p, (len(x), 1, E)), x], 1)),
    ),
    "token tiled": ((1, 1, E), lambda x, p: mixed(torch.cat([p.tile(len(x), 1, 1), x], 1))),
    "token like": ((1, 1, E), lambda x, p: mixed(torch.cat([p.expand_as(x[:, :1]), x], 1))),
    "token stacked": ((1, E), lambda x, p: mixed(torch.cat([torch.stack([p] * len(x)), x], 1))),
    "tokens": ((2, E), lambda x, p: mixed(torch.cat([p.expand(len(x), 2, E), x], 1))),
    "token of windows": ((1, 1, E), windowed),
    "mask token": ((1, 1, E), filled),
    "filled": ((2,), lambda x, p: x.masked_fill(x > 0, p.sum())),
    "in place": ((E,), added_in_place),
    "checkpointed": ((T, E), checkpointed),
    "without gradient": ((E,), without_gradient),
    "scaled twice": ((E,), lambda x, p: (x * p).sin() * p),
    "scalar": ((), lambda x, p: x * p + p),
    "alpha": ((E,), lambda x, p: torch.add(x, p, alpha=2)),
    "difference and ratio": ((E,), lambda x, p: (x - p) / (p.square() + 1)),
    "sum": ((E,), lambda x, p: sum([x, p])),
    "larger than the data": ((T, E), lambda x, p: x[:, :1] * p + p),
    "sequence first": ((T, 1, E), lambda x, p: (x.transpose(0, 1) + p).transpose(0, 1)),
    "behind a function": ((T, E), lambda x, p: Through.apply(x) + p),
    "in a function": ((E,), lambda x, p: x + Through.apply(p)),
    "by where it is": ((E,), lambda x, p: torch.addcmul(x, p, x[..., :1])),
    **{
        f"{name} {shape}": (shape, use)
        for shape in product((1, H), (1, T), (1, 2))
        for name, use in (
            ("added", lambda x, p: (heads(x) + p).transpose(1, 2).flatten(2)),
            ("multiplied", lambda x, p: (heads(x) * p).transpose(1, 2).flatten(2)),
        )
    },
}


def case_of(how):
    """The use behind a linear layer."""
    shape, use = USES[how]
    width = use(torch.zeros(1, T, E), torch.zeros(shape)).shape[-1]
    return seeded_case(
        lambda: Functional(
            lambda m, x: use(m.lin(x), m.p), width, lin=nn.Linear(WIDTH, E), p=parameter(*shape)
        ),
        (T, WIDTH),
    )


@pytest.mark.parametrize("how", USES)
def test_a_raw_parameter_has_an_exact_diagonal(how):
    example = case_of(how)
    curvature = fitted(example)
    assert_diagonal_blocks(example, curvature, ["p"])
    assert curvature.coverage["lin.weight"] == curvature.coverage["lin.bias"] == "kron"
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("how", USES)
def test_raw_parameters_do_not_depend_on_the_split_into_batches(how):
    """Batches of one example come first, last or alone: there every axis of length 1 is alike."""
    example = case_of(how)
    together = dense_blocks(fitted(in_batches(example, 7)))
    for sizes in SPLITS:
        assert_same_blocks(dense_blocks(fitted(in_batches(example, *sizes))), together, REORDERED)
