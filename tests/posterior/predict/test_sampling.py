"""Samples of parameters, functions and predictions against the dense posterior."""

import math

import pytest
import torch
from posterior import dense

STRUCTURES = ("kron", "diag", "full", "lowrank")
N_SAMPLES = 20_000
N_FUNCTIONS = 2_000  # each a pass through the network


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_moments(samples, mean, covariance, sigmas=5):
    """Sample mean and covariance within `sigmas` standard errors, entry by entry."""
    n = len(samples)
    centred = samples - mean
    variance = covariance.diagonal()
    assert (centred.mean(0).abs() <= sigmas * (variance / n).sqrt()).all()
    # Var of a product of two Gaussians: S_ii S_jj + S_ij^2
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert ((centred.T @ centred / n - covariance).abs() <= sigmas * error).all()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp-regression", "cnn", "vit", "conv-2d-groups"])
def test_samples_have_the_posteriors_mean_and_covariance(name, structure):
    """In parameters_to_vector order: a wrong order would mix variances of different tensors."""
    la, case = dense.fit(name, hessian_structure=structure, sigma_noise=1.0, temperature=0.5)
    count = la.prior_precision.numel()
    la.prior_precision = torch.linspace(0.5, 20, count, dtype=torch.float64)
    samples = la.sample(N_SAMPLES, generator=generator())
    assert samples.shape == (N_SAMPLES, len(dense.theta(la, case.model)))
    covariance = dense.precision(la, case.model, temperature=0.5).inverse()
    assert_moments(samples, dense.theta(la, case.model), covariance)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_frozen_parameter_has_no_column(structure):
    la, case = dense.fit("frozen-bias", hessian_structure=structure)
    expected = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    assert la.sample(2).shape == (2, expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_randomness_comes_from_the_generator_alone(structure):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure)
    state = torch.get_rng_state()
    for draw in (
        lambda g: la.sample(4, generator=g),
        lambda g: la.functional_samples(case.x, 4, generator=g),
        lambda g: la.predictive_samples(case.x, 4, generator=g),
        lambda g: la(case.x, link_approx="mc", n_samples=4, generator=g),
        lambda g: la(case.x, pred_type="linear", n_samples=4, generator=g),
        lambda g: la(case.x, pred_type="nn", n_samples=4, generator=g),
    ):
        assert torch.equal(draw(generator(1)), draw(generator(1)))
        assert not torch.equal(draw(generator(1)), draw(generator(2)))
        stream = generator(1)
        assert not torch.equal(draw(stream), draw(stream))  # the stream moves on
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_functional_samples_are_joint_across_inputs(structure):
    """Mean f, covariance J Sigma Jᵀ over all inputs at once; a peer shares one noise vector."""
    la, case = dense.fit("mlp-regression", hessian_structure=structure)
    x = torch.cat([case.x[:3], case.x[:1] + 1e-6])
    samples = la.functional_samples(x, N_FUNCTIONS, generator=generator())
    assert samples.shape == (N_FUNCTIONS, 4, 2)
    j = dense.jacobian(la, case, x).flatten(0, 1)
    covariance = j @ torch.linalg.solve(dense.precision(la, case.model), j.T)
    flat = samples.flatten(1)
    assert_moments(flat, case.model(x).detach().flatten(), covariance)
    correlation = torch.corrcoef(flat.T)
    assert correlation[0, 6] > 1 - 1e-9  # near-identical inputs move together
    scale = covariance.diagonal().sqrt()
    far = (covariance / scale / scale[:, None])[0, 4]
    assert abs(far) < 0.9  # so that the comparison above says something


def test_predictive_samples_classification_are_softmaxed_function_samples():
    la, case = dense.fit("mlp-tanh")
    probs = la.predictive_samples(case.x, 50, generator=generator())
    f = la.functional_samples(case.x, 50, generator=generator())
    assert probs.shape == (50, 7, 3)
    torch.testing.assert_close(probs, f.softmax(-1))


def test_predictive_samples_regression_add_the_noise():
    """y = f + sigma eps, noise independent across inputs and outputs."""
    la, case = dense.fit("mlp-regression", sigma_noise=0.8)
    samples = la.predictive_samples(case.x[:2], N_FUNCTIONS, generator=generator())
    j = dense.jacobian(la, case, case.x[:2]).flatten(0, 1)
    covariance = j @ torch.linalg.solve(dense.precision(la, case.model, 0.8), j.T)
    covariance = covariance + 0.8**2 * torch.eye(4)
    assert_moments(samples.flatten(1), case.model(case.x[:2]).detach().flatten(), covariance)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_linear_samples_average_to_the_glm_mean_and_covariance(structure):
    """`pred_type="linear"` is the GLM by simulation: f + J (theta_s - theta*)."""
    la, case = dense.fit("mlp-regression", hessian_structure=structure)
    x = case.x[:2]
    mean, covariance = la(x)
    drawn, spread = la(x, pred_type="linear", n_samples=N_FUNCTIONS, generator=generator())
    variance = covariance.diagonal(dim1=1, dim2=2)  # (n, c)
    assert ((drawn - mean).abs() <= 5 * (variance / N_FUNCTIONS).sqrt()).all()
    error = (variance[:, :, None] * variance[:, None] + covariance**2) / N_FUNCTIONS
    assert ((spread - covariance).abs() <= 5 * error.sqrt()).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_network_samples_of_a_linear_model_equal_the_glm(structure):
    """A network linear in its parameters has no linearisation error."""
    la, case = dense.fit("mlp-regression", hessian_structure=structure, subset_of_weights=["2.*"])
    x = case.x[:2]
    mean, covariance = la(x)
    drawn, _ = la(x, pred_type="nn", n_samples=N_FUNCTIONS, generator=generator())
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert ((drawn - mean).abs() <= 5 * (variance / N_FUNCTIONS).sqrt()).all()
    same = la.functional_samples(x, 3, pred_type="nn", generator=generator())
    other = la.functional_samples(x, 3, pred_type="linear", generator=generator())
    torch.testing.assert_close(same, other, rtol=1e-9, atol=1e-9)


def test_network_samples_are_the_network_at_sampled_weights():
    """(1/S) sum_s softmax f(x; theta_s), with theta_s from the same generator."""
    la, case = dense.fit("mlp-tanh")
    probs = la(case.x, pred_type="nn", n_samples=6, generator=generator())
    theta = la.sample(6, generator=generator())
    total = torch.zeros_like(probs)
    model = dense.build("mlp-tanh").model
    for row in theta:
        torch.nn.utils.vector_to_parameters(row, model.parameters())
        total += model(case.x).detach().softmax(-1)
    torch.testing.assert_close(probs, total / 6)


def test_tails_are_gaussian():
    """Kurtosis 3 in every covered coordinate: a colouring by the wrong root is not hidden."""
    la, case = dense.fit("mlp-tanh")
    samples = la.sample(N_SAMPLES, generator=generator()) - dense.theta(la, case.model)
    kurtosis = (samples**4).mean(0) / (samples**2).mean(0) ** 2
    assert ((kurtosis - 3).abs() <= 5 * math.sqrt(24 / N_SAMPLES)).all()
