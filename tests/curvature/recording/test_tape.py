"""What a recorder could get wrong without a word: idle uses, recomputed parts, odd batches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from functional import Functional, in_batches, parameter
from laws import (
    EXACT,
    REORDERED,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_exact_blocks,
    assert_same_blocks,
    dense_blocks,
    fitted,
    seeded_case,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

T, WIDTH, E = 5, 3, 4
settings = pytest.mark.parametrize("setting", ["expand", "reduce"])


class Idle(nn.Module):
    """A layer and a head, with or without uses whose results are thrown away."""

    def __init__(self, idle: bool):
        super().__init__()
        self.lin = nn.Linear(WIDTH, E)
        self.head = nn.Linear(E, 2)
        self.idle = idle

    def forward(self, x):
        if self.idle:
            self.head(self.lin(3 * x + 1))
        y = self.head(self.lin(x).tanh())
        if self.idle:
            self.head(self.lin(2 * x - 1).sin())
        return y if y.ndim == 2 else y.mean(1)


@settings
@pytest.mark.parametrize("shape", [(WIDTH,), (T, WIDTH)], ids=["rows", "tokens"])
def test_uses_that_do_not_reach_the_output_do_not_count(shape, setting):
    """Inputs of results that are thrown away enter no factor."""
    example = seeded_case(lambda: Idle(idle=True), shape)
    model = copy.deepcopy(example.model)
    model.idle = False
    without = fitted(Case(model, example.likelihood, example.batches), kfac_approx=setting)
    curvature = fitted(example, kfac_approx=setting)
    assert_same_blocks(dense_blocks(curvature), dense_blocks(without), EXACT)
    assert_dense_structures_are_exact(example)


class Checkpointed(nn.Module):
    """A module between two layers, recomputed in the backward pass."""

    def __init__(self, body: nn.Module, recompute: bool):
        super().__init__()
        self.lin = nn.Linear(WIDTH, E)
        self.body = body
        self.head = nn.Linear(E, 2)
        self.recompute = recompute

    def inner(self, x):
        if isinstance(self.body, nn.MultiheadAttention):
            return self.body(x, x, x)[0]
        return self.body(x)[0] if isinstance(self.body, nn.RNNBase) else self.body(x)

    def forward(self, x):
        y = self.lin(x)
        y = checkpoint(self.inner, y, use_reentrant=False) if self.recompute else self.inner(y)
        return self.head(y.mean(1))


BODIES = {
    "attention": lambda: nn.MultiheadAttention(E, 2, batch_first=True),
    "lstm": lambda: nn.LSTM(E, E, batch_first=True),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(E, E)),
    "norm": lambda: nn.LayerNorm(E),
}


@pytest.mark.parametrize("sizes", [(3, 3, 1), (1,) * 7], ids=["batches", "one by one"])
@pytest.mark.parametrize("how", BODIES)
def test_checkpointing_changes_nothing_exact(how, sizes):
    """Forms in place of fused calls must not differ between the forward and the recomputed pass."""
    example = seeded_case(lambda: Checkpointed(BODIES[how](), recompute=True), (T, WIDTH))
    assert_dense_structures_are_exact(in_batches(example, *sizes))


@pytest.mark.parametrize("sizes", [(3, 3, 1), (2, 3, 2), (5, 2), (1, 3, 3)])
def test_a_repetition_that_looks_like_the_batch(sizes):
    """A parameter repeated three times, and batches of three examples."""

    def function(m, x):
        return F.linear(x, m.p.expand(3, -1)) + x

    example = seeded_case(lambda: Functional(function, WIDTH, p=parameter(WIDTH)))
    assert_dense_structures_are_exact(in_batches(example, *sizes))


class Lookups(nn.Module):
    """One table, looked up by index and mixed by weights."""

    def __init__(self, hard_first: bool):
        super().__init__()
        self.table = parameter(WIDTH, E)
        self.head = nn.Linear(E, 2)
        self.hard_first = hard_first

    def forward(self, x):
        calls = [
            lambda: F.embedding((x[..., 0] > 0).long(), self.table),
            lambda: x.softmax(-1) @ self.table,
        ]
        hard, soft = (call() for call in calls) if self.hard_first else (c() for c in calls[::-1])
        return self.head((hard.sin() + soft).tanh().mean(1))


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("hard_first", [True, False])
def test_a_table_looked_up_and_mixed_is_no_kronecker_product(hard_first, setting):
    """One use has one-hot rows, whose A is diagonal; the other has not."""
    example = seeded_case(lambda: Lookups(hard_first), (T, WIDTH))
    assert_dense_structures_are_exact(example)
    assert_exact_blocks(example, fitted(example, kfac_approx=setting), ["table"])


class Experts(nn.Module):
    """Each row goes to one of two layers, of which one may stay without rows."""

    def __init__(self):
        super().__init__()
        self.w = parameter(2, E, WIDTH)
        self.head = nn.Linear(E, 2)

    def forward(self, x):
        out = x.new_zeros(len(x), E)
        for expert, w in enumerate(self.w):
            own = ((x[:, 0] > 0).long() == expert).nonzero()[:, 0]
            out = out.index_add(0, own, F.linear(x[own], w))
        return self.head(out.tanh())


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_layers_without_rows(structure):
    """Batches of one example leave one of the two experts idle."""
    example = in_batches(seeded_case(Experts), *(1,) * 7)
    together = fitted(in_batches(example, 7), hessian_structure=structure)
    split = fitted(example, hessian_structure=structure)
    assert_same_blocks(dense_blocks(split), dense_blocks(together), REORDERED)


class Recurrent(nn.Module):
    """A state that starts at zeros, which are no data although there is a row for each example."""

    def __init__(self):
        super().__init__()
        self.ih, self.hh = nn.Linear(WIDTH, E), nn.Linear(E, E)
        self.head = nn.Linear(E, 2)

    def forward(self, x):
        h = torch.zeros(len(x), E, dtype=x.dtype)
        for step in x.unbind(1):
            h = (self.ih(step) + self.hh(h)).tanh()
        return self.head(h)


@pytest.mark.parametrize("sizes", [(3, 3, 1), (1, 3, 3), (1,) * 7])
def test_a_state_that_starts_at_zero(sizes):
    example = in_batches(seeded_case(Recurrent, (T, WIDTH)), *sizes)
    assert_dense_structures_are_exact(example)
    together = dense_blocks(fitted(in_batches(example, 7)))
    assert_same_blocks(dense_blocks(fitted(example)), together, REORDERED)


ODD = {
    "one bias for all outputs": lambda m, x: F.linear(x, m.w, m.p[:1]) + F.linear(x, m.w, m.s),
    "a vector for a matrix": lambda m, x: F.linear(x, m.q)[..., None],
    "like the data": lambda m, x: F.linear(x, m.w.type_as(x)),
    "complex": lambda m, x: (x.to(torch.complex128) @ torch.complex(m.w, m.w.exp()).mT).abs(),
}


@pytest.mark.parametrize("how", ODD)
def test_odd_calls_are_exact(how):
    function = ODD[how]
    members = {
        "w": parameter(E, WIDTH),
        "p": parameter(E),
        "q": parameter(WIDTH),
        "s": parameter(1),
    }
    width = 1 if how == "a vector for a matrix" else E
    example = seeded_case(lambda: Functional(function, width, **members), (T, WIDTH))
    assert_dense_structures_are_exact(example)
    assert_complete(fitted(example), example.model)
