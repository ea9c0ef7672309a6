"""The posterior of a low-rank GGN beside the dense algebra of the same rows, and beside "full"."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import build
from posterior import dense

from kfac_laplace import Laplace, LowRank, MarglikTuner
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.log_dets import Grams, Wide

CASES = ["mlp-tanh", "mlp-regression", "cnn", "tokens"]
PRIORS = ["scalar", "layerwise", "unit", "diag"]
RANKS = [4, 1000]
cases = pytest.mark.parametrize("name", CASES)
priors = pytest.mark.parametrize("prior", PRIORS)
ranks = pytest.mark.parametrize("rank", RANKS)


def fit(name, rank, prior="layerwise", **options):
    """A posterior away from every default, and the case."""
    sigma = 0.6 if "regression" in name else 1.0
    options = {"prior_mean": 0.1, "temperature": 0.8, "sigma_noise": sigma} | options
    structure = "full" if rank is None else LowRank(rank)
    la, case = dense.fit(name, hessian_structure=structure, prior_structure=prior, **options)
    count = la.posterior.prior.length
    la.prior_precision = torch.linspace(0.4, 3, count, dtype=torch.float64)
    return la, case


def matrices(la, case):
    """H (P, P), the prior precisions (P,), and the likelihood's scale."""
    prior, layouts = la.posterior.prior, la.posterior.prior.layouts
    by_group = prior.by_group(la.prior_precision.detach())
    spread = {name: by_group[name].expand(o.matrix) for name, o in layouts.groups.items()}
    delta = layouts.flatten(spread)
    return la.curvature.blocks["lowrank"].dense(), delta, float(la.posterior.scale)


# --- the evidence --------------------------------------------------------------------------------


@cases
@priors
@ranks
def test_the_log_determinant_is_that_of_the_matrix(name, prior, rank):
    la, case = fit(name, rank, prior)
    hessian, delta, scale = matrices(la, case)
    want = oracles.log_det_ratio(hessian, scale, delta)
    torch.testing.assert_close(la.log_det_ratio, want)
    torch.testing.assert_close(la.posterior.blocks["lowrank"].log_det_ratio(), want)


@cases
@priors
@ranks
def test_gamma_is_that_of_the_matrix(name, prior, rank):
    la, case = fit(name, rank, prior)
    hessian, delta, scale = matrices(la, case)
    spread = torch.linalg.inv(scale * hessian + delta.diag())
    share = 1 - delta * spread.diagonal()
    posterior = la.posterior
    shared = posterior.prior.layouts.pack_vector(share)
    torch.testing.assert_close(
        posterior.effective_dimensions(), posterior.prior.shared_sums(shared)
    )
    by_group = torch.stack([shared[name].sum() for name in posterior.prior.layouts.groups])
    torch.testing.assert_close(posterior.effective_dimensions_by_group(), by_group)
    traces = posterior.prior.shared_sums(posterior.prior.layouts.pack_vector(hessian.diagonal()))
    torch.testing.assert_close(posterior.expansion.curvature, traces)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", ["mlp-regression", "tokens"])
def test_gradients_of_the_evidence_are_those_of_full(name, prior):
    """By δ, σ and T; "full" goes through a (P, P) Cholesky factor."""
    found = []
    for rank in (1000, None):
        la, _ = fit(name, rank, prior)
        leaves = {
            key: getattr(la.posterior.hyperparameters, key).detach().clone().requires_grad_()
            for key in ("prior_precision", "sigma_noise", "temperature")
        }
        value = la.posterior.at(Hyperparameters(**leaves)).log_marginal_likelihood
        found.append([value, *torch.autograd.grad(value, list(leaves.values()), allow_unused=True)])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_truncated_evidence_are_differences():
    la, _ = fit("mlp-regression", 4, "layerwise")
    posterior, start = la.posterior, la.prior_precision.detach()
    sigma = torch.tensor(0.7, dtype=torch.float64)

    def evidence(delta, sigma, temperature):
        hyper = Hyperparameters(delta, sigma, temperature)
        return posterior.at(hyper).log_marginal_likelihood

    given = (start, sigma, torch.tensor(0.9, dtype=torch.float64))
    assert torch.autograd.gradcheck(evidence, [g.clone().requires_grad_() for g in given])


def test_few_precisions_are_few_small_matrices():
    """One Gram matrix a precision, and the rows themselves where precisions are many."""
    of_rows = [fit("cnn", 4, prior)[0].posterior.expansion.of_rows for prior in PRIORS]
    assert [type(part) for part in of_rows] == [Grams, Grams, Wide, Wide]
    assert of_rows[0].matrices.shape == (1, 4, 4)


@cases
def test_a_search_finds_the_maximum_of_full(name):
    one, other = (fit(name, rank)[0].optimize_prior(tolerance=1e-8) for rank in (1000, None))
    torch.testing.assert_close(
        one.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=1e-8, atol=1e-8
    )


def test_fewer_directions_determine_fewer_dimensions():
    gammas = [
        float(fit("tokens", rank)[0].posterior.effective_dimensions().sum())
        for rank in (2, 8, 20, 1000)
    ]
    assert gammas == sorted(gammas) and gammas[0] < 2


# --- predictions ---------------------------------------------------------------------------------


@cases
@priors
@ranks
def test_draws_have_the_covariance_of_the_matrix(name, prior, rank):
    """Colour of the identity: C Cᵀ, with no chance in it."""
    la, case = fit(name, rank, prior)
    hessian, delta, scale = matrices(la, case)
    normal = la.posterior.blocks["lowrank"]
    eye = torch.eye(len(delta), dtype=torch.float64)[:, None, None]
    coloured = normal.colour(eye)[:, 0, 0]  # rows: images of unit vectors
    want = torch.linalg.inv(scale * hessian + delta.diag())
    torch.testing.assert_close(coloured.mT @ coloured, want)
    features = normal.features(eye)
    torch.testing.assert_close(features @ features.mT, want)


@cases
@ranks
def test_a_squared_norm_is_that_of_the_matrix(name, rank):
    la, case = fit(name, rank)
    hessian, delta, scale = matrices(la, case)
    away = torch.linspace(-1, 1, len(delta), dtype=torch.float64)
    want = away @ (scale * hessian + delta.diag()) @ away
    torch.testing.assert_close(la.square_norm(la.mean + away), want)
    normal = torch.distributions.MultivariateNormal(
        la.mean, precision_matrix=scale * hessian + delta.diag()
    )
    torch.testing.assert_close(la.log_prob(la.mean + away), normal.log_prob(la.mean + away))


@cases
@ranks
def test_output_covariances_are_those_of_the_matrix(name, rank):
    la, case = fit(name, rank)
    hessian, delta, scale = matrices(la, case)
    names = [n for n, _ in case.model.named_parameters()]
    jacobian = oracles.jacobian(case.model, *case.data, names)
    want = oracles.glm_covariance(jacobian, hessian, scale, delta)  # (n, k, k)
    torch.testing.assert_close(la.functional_variance(jacobian), want)
    found = la.predict(case.x).covariance
    n, c = len(case.x), found.shape[-1]
    rows = want.unflatten(2, (-1, c)).unflatten(1, (-1, c)).diagonal(dim1=1, dim2=3)
    torch.testing.assert_close(found.reshape(n, -1, c, c), rows.movedim(-1, 1))


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_predictions_are_those_of_full(name):
    """Joint over inputs, with gradients in them, and by every link."""
    (low, case), (full, _) = (fit(name, rank) for rank in (1000, None))
    if name == "mlp-regression":
        for one, other in zip(low(case.x, joint=True), full(case.x, joint=True), strict=True):
            torch.testing.assert_close(one, other)
    else:
        for link in ("probit", "bridge", "mc"):
            one, other = (la(case.x, link_approx=link) for la in (low, full))
            torch.testing.assert_close(one, other)
    slopes = []
    for la in (low, full):
        x = case.x.clone().requires_grad_()
        options = {} if name == "mlp-regression" else {"link_approx": "probit"}
        out = la(x, enable_backprop=True, **options)
        total = sum(part.square().sum() for part in (out if isinstance(out, tuple) else (out,)))
        slopes.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*slopes)


def test_draws_of_functions_have_the_moments_of_the_gaussian():
    """Linearised: mean f, covariance J P⁻¹ Jᵀ, within five standard errors of 500 draws."""
    la, case = fit("mlp-regression", 6)
    mean, covariance = la(case.x[:2], joint=True)
    n = 500
    draws = la.functional_samples(case.x[:2], n, pred_type="linear").flatten(1)
    error = (covariance.diagonal() / n).sqrt()
    assert bool(((draws.mean(0) - mean.flatten()).abs() < 5 * error).all())
    spread = draws.T.cov()
    d = covariance.diagonal()
    error = ((covariance.square() + d[:, None] * d) / n).sqrt()
    assert bool(((spread - covariance).abs() < 5 * error).all())


def test_float32_models_predict_as_float64_ones_do():
    (want, case), single = fit("mlp-tanh", 6), build("mlp-tanh")
    la = Laplace(
        single.model.float(), single.likelihood, hessian_structure=LowRank(6), prior_mean=0.1,
        temperature=0.8,
    ).fit([(x.float(), y) for x, y in single.batches])  # fmt: skip
    la.prior_precision = want.prior_precision
    torch.testing.assert_close(
        la.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        la.predict(single.x.float()).covariance.double(),
        want.predict(case.x).covariance,
        rtol=1e-4,
        atol=1e-5,
    )
    assert la.sample(3).dtype == torch.float64
    away = torch.linspace(-1, 1, 43, dtype=torch.float64)
    torch.testing.assert_close(
        la.square_norm(la.mean + away), want.square_norm(want.mean + away), rtol=1e-4, atol=1e-4
    )


def test_a_posterior_without_data_is_the_prior():
    la, _ = fit("cnn", 4)
    prior = la.posterior.without_data()
    assert float(prior.log_det_ratio) == 0
    noise = torch.randn(2, 1, 1, la.posterior.prior.size, dtype=torch.float64)
    delta = prior.blocks["lowrank"].delta
    torch.testing.assert_close(
        prior.blocks["lowrank"].colour(noise), noise * delta.rsqrt(), rtol=1e-12, atol=0
    )


# --- the rest of the house -----------------------------------------------------------------------


def test_the_matrix_of_the_precision_is_refused():
    la, _ = fit("mlp-tanh", 4)
    with pytest.raises(UnsupportedUse, match=r"few directions.*blocks\['lowrank'\].rows"):
        la.posterior_precision  # noqa: B018  # a property that raises


@pytest.mark.parametrize("objective", ["auto", "exact", "bounds"])
def test_objectives_take_it_as_they_take_full(objective):
    (low, case), (full, _) = (fit("mlp-tanh", rank) for rank in (1000, None))
    for la in (low, full):
        la.optimize_prior(objective=objective, tolerance=1e-7, loader=case.batches)
    torch.testing.assert_close(low.prior_precision, full.prior_precision, rtol=1e-4, atol=1e-6)


def test_a_tuner_takes_it():
    """The same rounds as by "full"."""
    found = []
    for structure in (LowRank(1000), "full"):
        case = build("mlp-regression")
        tuner = MarglikTuner(
            case.model, "regression", 7, hessian_structure=structure, n_epochs_burnin=1
        )
        optimiser = torch.optim.SGD(case.model.parameters(), lr=0.01)
        for _ in range(3):
            for x, y in case.batches:
                optimiser.zero_grad()
                tuner.loss(case.model(x), y).backward()
                optimiser.step()
            tuner.step(case.batches)
        found.append([record.evidence for record in tuner.history])
        assert set(tuner.coverage.values()) >= {
            "lowrank, tuned" if structure != "full" else "dense, tuned"
        }
    assert found[0] == pytest.approx(found[1], rel=1e-9)
