"""Backward vectors: exact roots of Lambda, Monte-Carlo labels, observed labels."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import build
from laws import assert_same_blocks, dense_blocks, fitted, relative_error
from torch import Tensor

from kfac_laplace import Bernoulli, Categorical, Empirical, Exact, Gaussian, Hybrid, MonteCarlo

LIKELIHOODS = {"classification": Categorical, "regression": Gaussian, "binary": Bernoulli}

LOGITS = {
    "moderate": [[0.3, -1.2, 0.9, 2.0], [0.0, 0.0, 0.0, 0.0]],
    "one certain": [[40.0, 0.0, -40.0, 1.0], [0.0, 0.0, 0.0, 90.0]],
    "saturated": [[800.0, 0.0, -800.0, 3.0], [-800.0, -800.0, 0.0, 0.0]],
    "tiny tail": [[0.0, -36.0, -37.0, -38.0], [-38.0, -37.0, -36.0, 0.0]],
    "tiny middle": [[0.0, -350.0, -345.0, 0.0], [0.0, -20.0, 0.0, -340.0]],
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def outer_sum(vectors: list[Tensor]) -> Tensor:
    """sum_v v v^T per example over flattened (t, c): (n, k, k)."""
    stacked = torch.stack([v.flatten(1) for v in vectors])  # (v, n, k)
    return torch.einsum("vnk,vnl->nkl", stacked, stacked)


def z_scores(products: Tensor, expected: Tensor) -> Tensor:
    """(mean - expected) / standard error over the leading axis."""
    error = products.mean(0) - expected
    spread = products.std(0) / len(products) ** 0.5
    # An entry that never varies must be right to rounding.
    return torch.where(spread > 1e-15, error / spread.clamp_min(1e-15), 1e15 * error)


@pytest.mark.parametrize("name", LOGITS)
def test_softmax_roots_multiply_to_lambda(name):
    f = torch.tensor(LOGITS[name], dtype=torch.float64)[:, None]  # (n, 1, c)
    roots = list(Categorical().roots(f))
    assert len(roots) == f.shape[-1] - 1
    p = f[:, 0].softmax(-1)
    want = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert (outer_sum(roots) - want).abs().max() < 1e-14


@pytest.mark.parametrize("name", LOGITS)
def test_softmax_roots_keep_their_relative_digits(name):
    """Entry by entry on the scale sqrt(H_ii H_jj), against p_i sum_{j != i} p_j: no p - p^2."""
    f = torch.tensor(LOGITS[name], dtype=torch.float64)[:, None]
    p = f[:, 0].softmax(-1)
    others = torch.stack([p.roll(-s, -1) for s in range(1, p.shape[-1])]).sum(0)
    diagonal = p * others
    want = -p[:, :, None] * p[:, None, :]
    want.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    scale = diagonal.sqrt()[:, :, None] * diagonal.sqrt()[:, None, :]
    error = (outer_sum(list(Categorical().roots(f))) - want).abs()
    # 1e-300: products below it leave float64's normal range
    assert (error <= 1e-13 * scale + 1e-300).all()


def test_binary_softmax_needs_one_vector():
    f = torch.randn(5, 1, 2, dtype=torch.float64)
    assert len(list(Categorical().roots(f))) == 1


@pytest.mark.parametrize("scale", [1.0, 30.0, 600.0])
def test_bernoulli_needs_one_vector(scale):
    f = scale * torch.tensor([[[0.7]], [[-1.0]], [[1.0]], [[0.0]]], dtype=torch.float64)
    (root,) = Bernoulli().roots(f)
    want = f.sigmoid() * (-f).sigmoid()
    assert ((root**2 - want) / want).abs().max() < 1e-14


def test_gaussian_roots_are_unit_vectors():
    f = torch.randn(3, 1, 4, dtype=torch.float64)
    want = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert torch.equal(outer_sum(list(Gaussian().roots(f))), want)


@pytest.mark.parametrize("name", ["tokens", "tokens-regression", "mlp-tanh", "mlp-binary"])
def test_exact_vectors_multiply_to_the_whole_hessian(name):
    """Over flattened (t, c), so cross terms between tokens have to be zero."""
    example = build(name)
    output = example.model(example.x).detach()
    f = oracles.terms(output, example.y, example.likelihood)
    likelihood = LIKELIHOODS[example.likelihood]()
    if name == "tokens-regression":
        f = output
    vectors = list(Exact().vectors(likelihood, f, example.y, generator()))
    want = oracles.output_hessian(output, example.y, example.likelihood)
    assert (outer_sum(vectors) - want).abs().max() < 1e-14
    columns = f.shape[-1] - (example.likelihood == "classification")
    assert len(vectors) == f.shape[1] * columns


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(), Bernoulli()], ids=type)
def test_monte_carlo_is_unbiased(likelihood, samples):
    """20,000 copies of two positions: every entry within four standard errors of Lambda."""
    row = torch.tensor([[0.5, -1.0, 1.5], [2.0, 0.0, -0.5]], dtype=torch.float64)
    f = row.expand(20_000, 2, 3)
    labels = torch.zeros(20_000, 2, dtype=torch.long)
    vectors = list(MonteCarlo(samples).vectors(likelihood, f, labels, generator(2)))
    assert len(vectors) == samples
    name = {v: k for k, v in LIKELIHOODS.items()}[type(likelihood)]
    target = labels[:1] if name == "classification" else row[None]
    want = oracles.output_hessian(row[None], target, name)[0]
    assert z_scores(outer_sum(vectors), want).abs().max() < 4


def test_monte_carlo_factors_are_unbiased_where_tokens_mix():
    """End to end: B of the value projection over 200 seeds."""
    example = build("tokens")
    want = fitted(example).blocks["attention.v.weight"].factors.output[0]
    batch = [(example.x, example.y)]
    draws = torch.stack(
        [
            fitted(example, batch, fisher="mc", seed=seed)
            .blocks["attention.v.weight"]
            .factors.output[0]
            for seed in range(100)
        ]
    )
    assert z_scores(draws, want).abs().max() < 4
    assert relative_error(draws[0], want) > 1e-3, "a single draw cannot be exact"


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(), Bernoulli()], ids=type)
def test_empirical_vector_is_the_score(likelihood):
    f = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    name = {v: k for k, v in LIKELIHOODS.items()}[type(likelihood)]
    y = torch.randint(0, 2, (4, 2) if name == "classification" else (4, 2, 3))
    y = y if name == "classification" else y.double()
    (vector,) = Empirical().vectors(likelihood, f.detach(), y, generator())
    nll = oracles.negative_log_likelihoods(f, y, name)
    (score,) = torch.autograd.grad(nll.sum(), f)
    assert (vector - score).abs().max() < 1e-14


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("fisher", [MonteCarlo(samples=2), Hybrid(1)])
def test_seeds_reproduce(fisher, structure):
    options = {"fisher": fisher, "hessian_structure": structure}
    first = dense_blocks(fitted("mlp-tanh", seed=3, **options))
    torch.rand(7)  # the global state is no input
    again = dense_blocks(fitted("mlp-tanh", seed=3, **options))
    other = dense_blocks(fitted("mlp-tanh", seed=4, **options))
    assert_same_blocks(again, first, 0.0)
    assert all(relative_error(other[name], first[name]) > 1e-3 for name in first)


def test_every_batch_draws_its_own_labels():
    """The same batch twice: equal labels would give exactly twice the factor."""
    example = build("mlp-regression")
    batch = example.batches[0]
    once = fitted(example, [batch], fisher="mc").blocks["0.weight"].factors.output
    twice = fitted(example, [batch, batch], fisher="mc").blocks["0.weight"].factors.output
    assert relative_error(twice, 2 * once) > 1e-2


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_global_rng_is_left_as_found(fisher):
    example = build("mlp-tanh")
    before = torch.get_rng_state()
    fitted(example, fisher=fisher)
    assert torch.equal(torch.get_rng_state(), before)
