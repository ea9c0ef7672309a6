"""The evidence and each of its terms against dense linear algebra, and its gradients."""

import oracles
import pytest
import torch
from cases import build
from posterior import dense
from torch import nn

from kfac_laplace import Laplace

STRUCTURES = ("kron", "diag", "full", "lowrank")
CASES = ("mlp-tanh", "mlp-binary", "cnn", "tokens", "vit", "twice", "frozen-bias", "frozen-weight")
REGRESSION = ("mlp-regression", "deep-linear-reduce", "tokens-regression")
TOL = {"rtol": 1e-10, "atol": 1e-9}  # float64 log-determinants of at most 150 dimensions


def spread(count: int) -> torch.Tensor:
    """Distinct positive precisions, so that a permuted block cannot go unnoticed."""
    return torch.linspace(0.5, 3.0, count, dtype=torch.float64)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CASES + REGRESSION)
def test_every_term_equals_the_dense_one(name, structure):
    """At sigma, T, mu and layerwise delta all away from their defaults."""
    sigma = 0.6 if name in REGRESSION else 1.0
    la, case = dense.fit(
        name, hessian_structure=structure, sigma_noise=sigma, temperature=0.7, prior_mean=0.3
    )
    la.prior_precision = spread(la.prior_precision.numel())
    hessian, delta = dense.hessian(la, case.model), dense.delta(la, case.model)
    theta, tau = dense.theta(la, case.model), dense.scale(sigma, 0.7)
    log_likelihood = dense.log_likelihood(case, sigma)
    ratio = oracles.log_det_ratio(hessian, tau, delta)

    torch.testing.assert_close(la.log_likelihood.double(), log_likelihood, **TOL)
    torch.testing.assert_close(la.log_det_ratio, ratio, **TOL)
    torch.testing.assert_close(
        la.log_det_posterior_precision, (tau * hessian + delta.diag()).logdet(), **TOL
    )
    torch.testing.assert_close(la.scatter, (delta * (theta - 0.3) ** 2).sum(), **TOL)
    expected = oracles.evidence(
        log_likelihood, hessian, theta, delta, sigma=sigma, temperature=0.7, prior_mean=0.3
    )
    torch.testing.assert_close(la.log_marginal_likelihood(), expected, **TOL)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "tokens", "vit", "twice", "mlp-binary"])
def test_full_and_diag_evidence_from_the_exact_ggn(name):
    """No block of the library enters the expected value: H is J^T Lambda J by autograd."""
    for structure in ("full", "diag"):
        la, case = dense.fit(name, hessian_structure=structure, prior_structure="scalar")
        ggn = oracles.ggn(case.model, *case.data, names=dense.covered(la, case.model))
        ggn = ggn if structure == "full" else ggn.diagonal().diag()
        theta, delta = dense.theta(la, case.model), torch.full((len(ggn),), 1.7).double()
        expected = oracles.evidence(dense.log_likelihood(case), ggn, theta, delta)
        got = la.log_marginal_likelihood(prior_precision=torch.tensor(1.7))
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-6)  # 1.7 is a float32


# "kron" refuses a "diag" prior; see test_kron_refuses_a_diagonal_prior
PRIORS = [(s, p) for s in STRUCTURES for p in ("scalar", "layerwise", "diag")]
PRIORS.remove(("kron", "diag"))


@pytest.mark.parametrize(("structure", "prior"), PRIORS)
def test_prior_structures(structure, prior):
    """A scalar, one value for each block, or one for each parameter reach every term."""
    la, case = dense.fit("mlp-tanh", hessian_structure=structure, prior_structure=prior)
    size = len(dense.theta(la, case.model))
    groups = 2  # the two layers, each with its bias
    count = {"scalar": 1, "layerwise": groups, "diag": size}[prior]
    assert la.prior_precision.numel() == count
    values = spread(count)
    delta = values.repeat_interleave(size // count) if prior != "layerwise" else None
    if delta is None:
        sizes = [sum(p.numel() for p in case.model[i].parameters()) for i in (0, 2)]
        delta = torch.cat([v.expand(n) for v, n in zip(values, sizes, strict=True)])
    expected = oracles.evidence(
        dense.log_likelihood(case),
        dense.hessian(la, case.model),
        dense.theta(la, case.model),
        delta,
    )
    torch.testing.assert_close(la.log_marginal_likelihood(values), expected, **TOL)


@pytest.mark.parametrize(("structure", "prior"), PRIORS)
@pytest.mark.parametrize("name", ["mlp-regression", "mlp-tanh", "cnn"])
def test_gradients_match_finite_differences(structure, prior, name):
    """Both delta and sigma reach the evidence; laplace-torch 0.3 loses sigma for kron."""
    la, case = dense.fit(name, hessian_structure=structure, prior_structure=prior, temperature=0.8)
    precision = spread(la.prior_precision.numel()).requires_grad_()
    inputs = (precision,)
    if case.likelihood == "regression":
        inputs += (torch.tensor(0.4, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, inputs)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_passed_in_are_kept_detached(structure):
    """laplace-torch users pass today's values and read the posterior afterwards."""
    la, _ = dense.fit("mlp-regression", hessian_structure=structure)
    precision = spread(2).requires_grad_()
    sigma = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = la.log_marginal_likelihood(precision, sigma)
    assert value.requires_grad and value.shape == ()
    torch.testing.assert_close(la.prior_precision.detach(), precision.detach())
    torch.testing.assert_close(la.sigma_noise.detach().double().squeeze(), sigma.detach())
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), value.detach(), **TOL)
    again = la.log_marginal_likelihood()
    if again.requires_grad:
        again.backward()
    assert precision.grad is None and sigma.grad is None


@pytest.mark.parametrize("structure", STRUCTURES)
def test_stored_hyperparameters_are_differentiable_too(structure):
    """Set as attributes or in the constructor, they keep their graph."""
    case = build("mlp-regression")
    start = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    la = Laplace(case.model, "regression", hessian_structure=structure, prior_precision=start)
    la.fit(case.batches)
    (from_constructor,) = torch.autograd.grad(la.log_marginal_likelihood(), start)
    delta = torch.full((2,), 2.0, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    la.prior_precision = delta
    torch.testing.assert_close(
        torch.autograd.grad(la.log_marginal_likelihood(), delta)[0].sum(), from_constructor
    )
    la.sigma_noise = sigma
    (stored,) = torch.autograd.grad(la.log_marginal_likelihood(), sigma)
    other = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (passed,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=other), other)
    torch.testing.assert_close(stored, passed)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float32_models_get_a_float64_evidence(structure):
    """Rank-2 inputs in 32 columns, delta = 1e-4: float32 eigenvalues would be 27 nats off."""
    draw = torch.Generator().manual_seed(0)
    x = 10 * torch.randn(200, 2, generator=draw).repeat(1, 16)
    y = torch.randn(200, 2, generator=draw)
    model = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2))
    options = {"hessian_structure": structure, "prior_precision": 1e-4}
    single = Laplace(model, "regression", **options).fit([(x, y)])
    got = single.log_marginal_likelihood()
    assert got.dtype == torch.float64
    if structure == "kron":
        naive = sum(float32_log_det_ratio(b, 1e-4) for b in single.curvature.blocks.values())
        assert abs(naive - single.log_det_ratio) > 10
    double = Laplace(model.double(), "regression", **options).fit([(x.double(), y.double())])
    # What is left are the float32 forward and backward passes: 1e-7 relative in each eigenvalue.
    torch.testing.assert_close(got, double.log_marginal_likelihood(), rtol=0, atol=1e-2)


def float32_log_det_ratio(block, delta):
    """What the same factors in float32 would give."""
    a, b = (
        torch.linalg.eigvalsh(factor.float())[0].double().clamp_min(0) for factor in block.factors
    )
    return (b[:, None] * a / delta).log1p().sum()
