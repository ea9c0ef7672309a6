"""Evidence and predictive of parts, products and computed weights against the dense algebra."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from functional import Functional, parameter
from laws import seeded_case
from posterior import dense
from torch import nn
from torch.nn.utils import parametrizations

from kfac_laplace import Laplace

T, WIDTH, E = 4, 3, 4
TOL = {"rtol": 1e-9, "atol": 1e-10}  # float64 solves of well-conditioned P, at most 150 dimensions


def attention(m, x):
    """A packed projection in three parts, behind a weight (i, o) and a table of positions."""
    x = x @ m.w + F.embedding(torch.arange(T), m.position)
    parts = zip(m.packed.chunk(3), m.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, weight, bias) for weight, bias in parts)
    return (q @ k.mT).softmax(-1) @ v


def with_token(m, x):
    """A class token before tokens, and a weight merged of three parameters."""
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1)
    return F.linear((x + (x @ x.mT).softmax(-1) @ x), m.w + m.b @ m.a)


MODELS = {
    "attention": lambda: Functional(
        attention,
        E,
        w=parameter(WIDTH, E),
        position=parameter(T, E),
        packed=parameter(3 * E, E),
        bias=parameter(3 * E),
    ),
    "token": lambda: Functional(
        with_token,
        E,
        token=parameter(1, 1, WIDTH),
        w=parameter(E, WIDTH),
        b=parameter(E, 1),
        a=parameter(1, WIDTH),
    ),
    "weight norm": lambda: Functional(
        lambda m, x: m.lin(x), E, lin=parametrizations.weight_norm(nn.Linear(WIDTH, E))
    ),
    "heads": lambda: Functional(
        lambda m, x: torch.einsum("nti,hio->ntho", x, m.w).flatten(2) * m.s.exp(),
        E,
        w=parameter(2, WIDTH, 2),
        s=parameter(E),
    ),
}


def fit(how: str, **options) -> tuple[Laplace, Case]:
    """A regression posterior with a precision of its own for each group."""
    example = seeded_case(MODELS[how], (T, WIDTH), "regression")
    la = Laplace(example.model, "regression", sigma_noise=0.6, **options).fit(example.batches)
    la.prior_precision = torch.linspace(0.5, 3, len(la.curvature.groups), dtype=torch.float64)
    return la, example


structures = pytest.mark.parametrize("structure", ["kron", "diag", "full"])
biases = pytest.mark.parametrize("joint_bias", [True, False])
models = pytest.mark.parametrize("how", MODELS)


@structures
@biases
@models
def test_evidence(how, joint_bias, structure):
    la, example = fit(how, joint_bias=joint_bias, hessian_structure=structure)
    expected = oracles.evidence(
        dense.log_likelihood(example, 0.6),
        dense.hessian(la, example.model),
        dense.theta(la, example.model),
        dense.delta(la, example.model),
        sigma=0.6,
    )
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), expected, **TOL)


@structures
@biases
@models
def test_covariance(how, joint_bias, structure):
    la, example = fit(how, joint_bias=joint_bias, hessian_structure=structure)
    j = dense.jacobian(la, example)
    precision = dense.precision(la, example.model, 0.6)
    mean, covariance = la(example.x)
    torch.testing.assert_close(mean, example.model(example.x).detach(), **TOL)
    torch.testing.assert_close(covariance, j @ torch.linalg.solve(precision, j.mT), **TOL)
