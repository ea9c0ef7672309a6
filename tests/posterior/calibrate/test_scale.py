"""The posterior scale kappa: leave-one-out against brute force, validation against the mode."""

import math

import pytest
import torch
from cases import build
from posterior import dense
from torch import nn

from kfac_laplace import KfacLaplaceError, Laplace
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points

STRUCTURES = ("kron", "diag", "full", "lowrank")


def nll(la, batches):
    """Mean -log p(y | x) of the predictive on (x, y) batches."""
    total, count = 0.0, 0
    for x, y in batches:
        distribution = la.predict(x).distribution()
        y = y.reshape(distribution.batch_shape + distribution.event_shape)
        total -= float(distribution.log_prob(y).sum())
        count += len(x)
    return total / count


def at_scale(la, kappa, batches):
    la.posterior_scale = kappa
    return nll(la, batches)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "mlp-regression", "mlp-binary"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_validation_is_no_worse_than_the_mode_or_the_raw_posterior(name, structure):
    """kappa = 0 is the mode and kappa = 1 the posterior as it came: both are in the search."""
    la, case = dense.fit(name, hessian_structure=structure)
    evidence = la.log_marginal_likelihood().detach()
    assert la.calibrate(case.batches, method="validation") is la
    kappa = float(la.posterior_scale)
    assert math.isfinite(kappa) and kappa >= 0
    calibrated = nll(la, case.batches)
    for other in (0.0, 0.5 * kappa, 1.0, 2 * kappa):
        # a one-dimensional search stops within 1e-4 nats an example of its optimum
        assert calibrated <= at_scale(la, other, case.batches) + 1e-4
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), evidence, rtol=0, atol=0)


def test_scale_multiplies_every_predictive_covariance_and_not_the_evidence():
    la, case = dense.fit("mlp-regression")
    mean, covariance = la(case.x)
    _, joint = la(case.x, joint=True)
    samples = la.functional_samples(case.x, 4, generator=torch.Generator().manual_seed(1))
    evidence = la.log_marginal_likelihood().detach()
    la.posterior_scale = 0.25
    scaled_mean, scaled = la(case.x)
    torch.testing.assert_close(scaled_mean, mean)
    torch.testing.assert_close(scaled, 0.25 * covariance)
    torch.testing.assert_close(la(case.x, joint=True)[1], 0.25 * joint)
    torch.testing.assert_close(la.predict(case.x).covariance, 0.25 * covariance)
    again = la.functional_samples(case.x, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again - mean, 0.5 * (samples - mean))
    la.posterior_scale = 1.0
    weights = la.sample(4, generator=torch.Generator().manual_seed(1))
    la.posterior_scale = 0.25
    mode = dense.theta(la, case.model)
    scaled_weights = la.sample(4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scaled_weights - mode, 0.5 * (weights - mode))
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), evidence, rtol=0, atol=0)


def test_scale_zero_is_the_mode():
    la, case = dense.fit("mlp-tanh")
    la.posterior_scale = 0.0
    torch.testing.assert_close(la(case.x), case.model(case.x).detach().softmax(-1))


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "vit", "mlp-regression", "mlp-binary"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_leave_one_out_needs_no_loader_and_leaves_the_evidence(name, structure):
    la, case = dense.fit(name, hessian_structure=structure)
    evidence = la.log_marginal_likelihood().detach()
    assert la.calibrate() is la
    kappa = float(la.posterior_scale)
    assert math.isfinite(kappa) and kappa >= 0
    torch.testing.assert_close(la.log_marginal_likelihood().detach(), evidence, rtol=0, atol=0)
    assert torch.isfinite(torch.as_tensor(nll(la, case.batches)))


def linear_gaussian(n=9, outputs=1):
    """A linear model at its exact MAP for delta = 0.5, sigma = 0.4."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, dtype=torch.float64, generator=draw)
    y = torch.randn(n, outputs, dtype=torch.float64, generator=draw)
    model = nn.Linear(3, outputs, bias=False).double()
    ridge = x.T @ x / 0.4**2 + 0.5 * torch.eye(3)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(ridge, x.T @ y / 0.4**2).T)
    return model, x, y


def refit_without(x, y, i):
    """Exact posterior mean and covariance of f(x_i) from the other points."""
    keep = torch.arange(len(x)) != i
    precision = x[keep].T @ x[keep] / 0.4**2 + 0.5 * torch.eye(3)
    mean = torch.linalg.solve(precision, x[keep].T @ y[keep] / 0.4**2)
    return x[i] @ mean, x[i] @ torch.linalg.solve(precision, x[i])


def brute_force_nll(x, y, kappa):
    """Mean over points of -log N(y_i | f_-i, kappa v_-i + sigma^2)."""
    total = 0.0
    for i in range(len(x)):
        mean, variance = refit_without(x, y, i)
        noise = (kappa * variance + 0.4**2).sqrt()
        total -= float(torch.distributions.Normal(mean, noise).log_prob(y[i]).sum())
    return total / len(x)


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_leave_one_out_equals_exact_refits_on_a_linear_gaussian_model(outputs, structure):
    """One linear layer, whose GGN is exact in both: the leverage formula is exact refitting."""
    model, x, y = linear_gaussian(outputs=outputs)
    la = Laplace(
        model,
        "regression",
        hessian_structure=structure,
        prior_precision=0.5,
        sigma_noise=0.4,
        prior_structure="scalar",
    ).fit([(x, y)])
    points = leave_one_out_points(la.posterior, [(x, y)], "labels", seed=0)
    for i in range(len(x)):
        mean, variance = refit_without(x, y, i)
        torch.testing.assert_close(points.mean[i, 0], mean, rtol=1e-9, atol=1e-9)
        covariance = variance * torch.eye(outputs, dtype=torch.float64)
        torch.testing.assert_close(points.covariance[i, 0], covariance, rtol=1e-9, atol=1e-9)

    la.calibrate()
    found = brute_force_nll(x, y, float(la.posterior_scale))
    grid = torch.logspace(-4, 3, 71, dtype=torch.float64)
    # the bounded search stops within 1e-4 of log kappa of the optimum: second order in the NLL
    assert found <= min(brute_force_nll(x, y, kappa) for kappa in grid) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_leave_one_out_of_a_sample_of_points_leaves_them_out_entirely(structure):
    """More points than are looked at: the curvature of the rest must not contain theirs again."""
    model, x, y = linear_gaussian(n=2500)
    la = Laplace(
        model,
        "regression",
        hessian_structure=structure,
        prior_precision=0.5,
        sigma_noise=0.4,
        prior_structure="scalar",
    ).fit([(x, y)])
    points = leave_one_out_points(la.posterior, [(x, y)], "labels", seed=0)
    assert len(points.mean) < len(x)
    for row in range(5):
        (i,) = (y[:, 0] == points.target[row, 0, 0]).nonzero()[0]
        mean, variance = refit_without(x, y, i)
        # the effect of one point is of order 1e-3: 1e-9 asks for six digits of it
        torch.testing.assert_close(points.mean[row, 0], mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(points.covariance[row, 0, 0, 0], variance, rtol=0, atol=1e-9)


def test_calibration_needs_known_methods_and_data():
    la, case = dense.fit("mlp-tanh")
    before = float(la.posterior_scale)
    assert before == 1.0
    with pytest.raises(KfacLaplaceError, match="loo"):
        la.calibrate(case.batches, method="magic")
    with pytest.raises(KfacLaplaceError):
        la.calibrate(method="validation")
    with pytest.raises(KfacLaplaceError):
        la.calibrate([], method="validation")
    assert float(la.posterior_scale) == before


def test_fitting_again_keeps_the_scale_until_it_is_calibrated_again():
    """Like every other hyperparameter; streaming data does not reset it."""
    case = build("mlp-tanh")
    # Labels that there is something to learn of: leave-one-out has ground for a scale then.
    batches = [(x, case.model(x).argmax(1)) for x, _ in case.batches]
    la = Laplace(case.model, "classification").fit(batches)
    la.posterior_scale = 0.3
    la.fit(batches[:1])
    assert float(la.posterior_scale) == 0.3
    la.fit(batches[1:], override=False).calibrate()
    assert float(la.posterior_scale) != 0.3


@pytest.mark.parametrize("value", [-0.1, torch.nan, torch.inf])
def test_the_scale_is_a_finite_number_from_zero_up(value):
    la, _ = dense.fit("mlp-tanh")
    with pytest.raises(KfacLaplaceError, match="posterior_scale"):
        la.posterior_scale = value
    assert float(la.posterior_scale) == 1.0


def test_leave_one_out_reads_again_what_fit_read():
    """Without a loader: all loaders of streaming fits; spent generators and parts are errors."""
    la, case = dense.fit("mlp-regression")
    expected = float(la.calibrate(case.batches).posterior_scale)
    for other in (case.batches[1:], [*case.batches, case.batches[0]]):
        with pytest.raises(KfacLaplaceError, match="the fit saw 7"):
            la.calibrate(other, "loo")
    streamed = Laplace(case.model, "regression").fit(case.batches[:1])
    streamed.fit(case.batches[1:], override=False)
    assert float(streamed.calibrate().posterior_scale) == pytest.approx(expected, rel=1e-6)
    spent = Laplace(case.model, "regression").fit(batch for batch in case.batches)
    with pytest.raises(KfacLaplaceError, match="loader"):
        spent.calibrate()
