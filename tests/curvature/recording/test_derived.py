"""Weights computed from parameters: exact blocks, pulled back through the computation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from functional import Functional, in_batches, parameter
from laws import (
    REORDERED,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_same_blocks,
    dense_blocks,
    fitted,
    seeded_case,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

T, WIDTH, E = 4, 3, 4


class Sign(torch.autograd.Function):
    """The sign, with the gradient of the identity: no call that is recorded."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def old_norm(norm):
    """A module under one of the older functions, which warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(nn.Linear(WIDTH, E))


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)


def generated(model: nn.Module, size: int) -> Tensor:
    """What a hypernetwork makes of constants."""
    return model.net(torch.linspace(-1, 1, size, dtype=model.net[0].weight.dtype))


def hypernetwork(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, outputs))


#: function of the model and inputs (n, t, i), and the members it needs
MODELS = {
    "weight norm": lambda: Functional(
        lambda m, x: m.lin(x), E, lin=parametrizations.weight_norm(nn.Linear(WIDTH, E))
    ),
    "weight norm by hooks": lambda: Functional(
        lambda m, x: m.lin(x), E, lin=old_norm(nn.utils.weight_norm)
    ),
    "spectral norm": lambda: Functional(
        lambda m, x: m.lin(x), E, lin=parametrizations.spectral_norm(nn.Linear(WIDTH, E))
    ).eval(),
    "spectral norm by hooks": lambda: Functional(
        lambda m, x: m.lin(x), E, lin=old_norm(nn.utils.spectral_norm)
    ).eval(),
    **{
        f"orthogonal {how}": lambda how=how: Functional(
            lambda m, x: m.lin(x),
            WIDTH,
            lin=parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), orthogonal_map=how),
        )
        for how in ("matrix_exp", "cayley", "householder")
    },
    "standardised": lambda: Functional(
        lambda m, x: F.linear(x, standardised(m.w), m.b), E, w=parameter(E, WIDTH), b=parameter(E)
    ),
    "standardised kernel": lambda: Functional(
        lambda m, x: F.conv1d(x.mT, standardised(m.w.flatten(1)).view_as(m.w)).mT,
        E,
        w=parameter(E, WIDTH, 2),
    ),
    "positive scale": lambda: Functional(
        lambda m, x: F.linear(x, m.w) * F.softplus(m.s), E, w=parameter(E, WIDTH), s=parameter(E)
    ),
    "positive weights": lambda: Functional(lambda m, x: x @ m.w.exp(), E, w=parameter(WIDTH, E)),
    "merged adapter": lambda: Functional(
        lambda m, x: F.linear(x, m.w + 2 * m.b @ m.a),
        E,
        w=parameter(E, WIDTH),
        b=parameter(E, 2),
        a=parameter(2, WIDTH),
    ),
    "merged adapter over frozen weights": lambda: Functional(
        lambda m, x: F.linear(x, m.w + m.b @ m.a),
        E,
        w=nn.Parameter(torch.randn(E, WIDTH), requires_grad=False),
        b=parameter(E, 2),
        a=parameter(2, WIDTH),
    ),
    "packed by cat": lambda: Functional(
        lambda m, x: F.linear(x, torch.cat([m.q, m.k]), torch.cat([m.b, torch.zeros_like(m.b)])),
        4,
        q=parameter(2, WIDTH),
        k=parameter(2, WIDTH),
        b=parameter(2),
    ),
    "hypernetwork": lambda: Functional(
        lambda m, x: F.linear(x, generated(m, 5).view(E, WIDTH)), E, net=hypernetwork(E * WIDTH)
    ),
    "hypernetwork of a scale": lambda: Functional(
        lambda m, x: x * generated(m, 5), WIDTH, net=hypernetwork(WIDTH)
    ),
    "plain and derived": lambda: Functional(
        lambda m, x: F.linear(F.linear(x, m.w), m.w.softmax(-1)), WIDTH, w=parameter(WIDTH, WIDTH)
    ),
    "without a rule": lambda: Functional(
        lambda m, x: torch.cdist(x, m.w.exp()), E, w=parameter(E, WIDTH)
    ),
    "rounded": lambda: Functional(
        lambda m, x: F.linear(x, m.w + (m.w.sign() - m.w).detach()), E, w=parameter(E, WIDTH)
    ),
    "rounded by a function": lambda: Functional(
        lambda m, x: F.linear(x, Sign.apply(m.w)), E, w=parameter(E, WIDTH)
    ),
    "decomposed": lambda: Functional(
        lambda m, x: F.linear(x, torch.linalg.cholesky(m.w @ m.w.T + torch.eye(3).to(m.w))),
        WIDTH,
        w=parameter(WIDTH, WIDTH),
    ),
    "circulant": lambda: Functional(
        lambda m, x: x @ torch.stack([m.w.roll(k) for k in range(WIDTH)]), WIDTH, w=parameter(WIDTH)
    ),
    "through a buffer": lambda: Functional(
        lambda m, x: F.linear(x, torch.zeros(E, WIDTH).to(m.w).index_add(0, torch.arange(2), m.w)),
        E,
        w=parameter(2, WIDTH),
    ),
    "one entry": lambda: Functional(lambda m, x: x * (m.w.sigmoid() + 1), WIDTH, w=parameter(1)),
}


def case_of(how):
    return seeded_case(MODELS[how], (T, WIDTH))


#: Parameters with Kronecker factors beside the derived ones: the head, and plain biases.
PLAIN = ("head.weight", "head.bias", "lin.bias")


@pytest.mark.parametrize("how", MODELS)
def test_parameters_of_derived_weights_have_exact_diagonals(how):
    example = case_of(how)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    trained = [n for n, p in example.model.named_parameters() if p.requires_grad]
    plain = [*PLAIN, "b"] if how == "standardised" else PLAIN
    plain = [*plain, "w"] if how == "positive scale" else plain
    derived = [name for name in trained if name not in plain]
    assert derived
    assert_diagonal_blocks(example, curvature, derived)
    assert all(curvature.coverage[name] == "kron" for name in trained if name in plain)


@pytest.mark.parametrize("how", MODELS)
def test_derived_weights_are_exact_in_dense_structures(how):
    assert_dense_structures_are_exact(case_of(how))


@pytest.mark.parametrize("how", MODELS)
def test_derived_weights_do_not_depend_on_the_split_into_batches(how):
    example = case_of(how)
    together = dense_blocks(fitted(in_batches(example, 7)))
    for sizes in ((1, 3, 3), (1,) * 7):
        assert_same_blocks(dense_blocks(fitted(in_batches(example, *sizes))), together, REORDERED)


def test_the_same_weight_computed_twice_is_one_sum():
    """Each use keeps its own computation: a second one does not count for the first."""
    once = seeded_case(
        lambda: Functional(
            lambda m, x: (lambda w: F.linear(x, w) * F.linear(x.tanh(), w))(m.w.square()),
            E,
            w=parameter(E, WIDTH),
        ),
        (T, WIDTH),
    )
    again = copy.deepcopy(once.model)
    again.function = lambda m, x: F.linear(x, m.w.square()) * F.linear(x.tanh(), m.w.square())
    blocks = dense_blocks(fitted(once))
    other = type(once)(again, once.likelihood, once.batches)
    assert_same_blocks(dense_blocks(fitted(other)), blocks, REORDERED)


@pytest.mark.parametrize("choice", ["error", "freeze"])
def test_derived_weights_count_as_uncovered(choice):
    from kfac_laplace.errors import UnsupportedUse

    example = case_of("merged adapter")
    if choice == "error":
        with pytest.raises(UnsupportedUse, match=r"w, b, a"):
            fitted(example, uncovered="error")
        return
    curvature = fitted(example, uncovered="freeze")
    frozen = {name for name, kind in curvature.coverage.items() if kind == "frozen"}
    assert frozen == {"w", "b", "a"}
    assert_complete(curvature, example.model)
