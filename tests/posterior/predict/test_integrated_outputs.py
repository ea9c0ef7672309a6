"""Averages over Gaussian outputs against quadrature, for likelihoods without closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import Poisson as TorchPoisson
from torch.distributions import StudentT as TorchStudentT

from kfac_laplace import (
    Bernoulli,
    BradleyTerry,
    Gaussian,
    Heteroscedastic,
    Likelihood,
    Poisson,
    StudentT,
)
from kfac_laplace.likelihoods import Latent
from kfac_laplace.posterior.predict.predictive import Predictive

SIGMA = torch.tensor(0.6, dtype=torch.float64)
NODES, WEIGHTS = np.polynomial.hermite.hermgauss(100)
Z = torch.as_tensor(NODES) * 2**0.5
W = torch.as_tensor(WEIGHTS) / np.pi**0.5


def predictive(likelihood: Likelihood, mean: Tensor, covariance: Tensor, **options) -> Predictive:
    """The predictive at rows of means (n, c) and covariances (n, c, c)."""
    return Predictive(
        likelihood, mean[:, None], covariance[:, None], mean.shape, -1, SIGMA, **options
    )


MEAN = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)
VARIANCE = torch.tensor([[[0.3]], [[0.0]], [[0.5]]], dtype=torch.float64)
F = MEAN + VARIANCE[:, :, 0].sqrt() * Z  # (3, 100)
COUNTS = torch.arange(0.0, 4000, dtype=torch.float64)


def poisson_mixture() -> Tensor:
    """p(y | x) of the counts (3, 4000), and the components' (3, 100, 4000)."""
    return TorchPoisson(F.exp()[..., None]).log_prob(COUNTS).exp()


def test_poisson_moments_and_density():
    got = predictive(Poisson(), MEAN, VARIANCE)
    by_count = torch.einsum("nky,k->ny", poisson_mixture(), W)
    torch.testing.assert_close(got.mean, (by_count @ COUNTS)[:, None], rtol=1e-9, atol=0)
    distribution = got.distribution()
    y = torch.tensor([[0.0], [1.0], [17.0]], dtype=torch.float64)
    want = by_count.gather(1, y.long()).log()[:, 0]
    torch.testing.assert_close(distribution.log_prob(y), want)
    torch.testing.assert_close(distribution.mean, got.mean)
    second = by_count @ COUNTS.square()
    torch.testing.assert_close(distribution.variance[:, 0], second - got.mean[:, 0] ** 2)


def test_student_t_moments_and_density():
    got = predictive(StudentT(df=5), MEAN, VARIANCE)
    assert torch.equal(got.mean, MEAN)
    y = torch.tensor([[-3.0], [0.3], [1.0]], dtype=torch.float64)
    # a sum over 4000 steps: the density has poles beside the reals, at a distance of 1.3
    z = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    f = MEAN + VARIANCE[:, :, 0].sqrt() * z
    weights = Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    want = TorchStudentT(5.0, f, SIGMA).log_prob(y).exp() @ weights
    torch.testing.assert_close(got.distribution().log_prob(y), want.log(), rtol=1e-9, atol=1e-9)
    # variance of the noise: sigma^2 df / (df - 2)
    variance = VARIANCE[:, 0] + SIGMA**2 * 5 / 3
    torch.testing.assert_close(got.distribution().variance, variance)


def test_poisson_information_is_that_of_the_counts():
    """H[y] and I by sums over counts, within five standard errors of 3000 draws."""
    components = poisson_mixture()
    by_count = torch.einsum("nky,k->ny", components, W)
    surprise = -by_count.clamp_min(1e-300).log()
    entropy = (by_count * surprise).sum(1)
    own = -torch.special.xlogy(components, components).sum(-1) @ W
    got = predictive(Poisson(), MEAN, VARIANCE, n_samples=3000)
    deviation = (by_count * surprise.square()).sum(1) - entropy.square()
    error = 5 * (deviation / 3000).sqrt()
    assert ((got.entropy - entropy).abs() <= error).all()
    # the information of one draw, KL(p(f | y) || p(f)), spreads less than the surprise
    assert ((got.epistemic - (entropy - own)).abs() <= error).all()
    assert abs(float(got.epistemic[1])) < 1e-12  # a certain f


def test_gaussian_noise_by_averages_is_the_closed_form():
    """Student-t with 1e7 degrees of freedom is Gaussian noise to 1e-6."""
    got = predictive(StudentT(df=1e7), MEAN, VARIANCE, n_samples=3000)
    total = VARIANCE[:, 0, 0] + SIGMA**2
    information = 0.5 * (total / SIGMA**2).log()
    # one draw's information is ½ log ratio + a share of ½ (χ² − 1)
    assert ((got.epistemic - information).abs() <= 5 * (0.5 / 3000) ** 0.5).all()
    entropy = 0.5 * (2 * np.pi * np.e * total).log()
    # the entropy of the noise is known: no other error than the information's
    torch.testing.assert_close(
        got.entropy - entropy, got.epistemic - information, rtol=0, atol=1e-5
    )


NATURAL = torch.tensor([[0.5, 0.3], [-2.0, -1.0]], dtype=torch.float64)
JOINT = torch.tensor([[[0.4, 0.1], [0.1, 0.3]], [[1.0, -0.3], [-0.3, 0.2]]], dtype=torch.float64)


def natural_nodes() -> tuple[Tensor, Tensor]:
    """Outputs (2, 10000, 2) and their weights."""
    z = torch.cartesian_prod(Z, Z)
    weights = torch.cartesian_prod(W, W).prod(1)
    return NATURAL[:, None] + z @ torch.linalg.cholesky(JOINT).mT, weights


def test_heteroscedastic_mean_is_in_closed_form():
    f, weights = natural_nodes()
    want = (f[..., 0] * (-f[..., 1]).exp()) @ weights
    torch.testing.assert_close(predictive(Heteroscedastic(), NATURAL, JOINT).mean[:, 0], want)


def test_heteroscedastic_density_is_an_average_over_draws():
    """Within five standard errors of 4000 draws, and telling it from the density at the mean."""
    f, weights = natural_nodes()
    y = torch.tensor([[1.5], [-2.5]], dtype=torch.float64)

    def density(f: Tensor) -> Tensor:
        precision = f[..., 1].exp()
        return Normal(f[..., 0] / precision, precision.rsqrt()).log_prob(y).exp()

    want = density(f) @ weights
    error = ((density(f).square() @ weights - want.square()) / 4000).sqrt()
    got = predictive(Heteroscedastic(), NATURAL, JOINT, n_samples=4000)
    by_distribution = got.distribution().log_prob(y).exp()
    assert ((by_distribution - want).abs() <= 5 * error).all()
    assert ((density(NATURAL[:, None])[:, 0] - want).abs() > 5 * error).all()


def test_several_outputs_keep_their_covariance():
    """E y₁ y₂ of two counts sees the covariance of their rates."""
    mean = torch.tensor([[0.2, 0.5]], dtype=torch.float64)
    covariance = torch.tensor([[[0.3, 0.25], [0.25, 0.3]]], dtype=torch.float64)
    got = predictive(Poisson(), mean, covariance, n_samples=20_000)
    y = torch.tensor([[4.0, 6.0]], dtype=torch.float64)
    z = torch.cartesian_prod(Z, Z) @ torch.linalg.cholesky(covariance[0]).T + mean
    weights = torch.cartesian_prod(W, W).prod(1)
    p = TorchPoisson(z.exp()).log_prob(y).sum(-1).exp()
    want = weights @ p
    error = ((weights @ p.square() - want**2) / 20_000).sqrt()
    assert abs(float(got.distribution().log_prob(y).exp() - want)) <= 5 * error
    apart = predictive(Poisson(), mean, torch.diag_embed(covariance.diagonal(dim1=1, dim2=2)))
    assert abs(float(apart.distribution().log_prob(y).exp() - want)) > 20 * error


def test_samples_take_the_place_of_the_gaussian():
    samples = torch.tensor([[[[0.0]]], [[[1.0]]], [[[2.0]]]], dtype=torch.float64)
    mean, variance = samples.mean(0)[:, 0], torch.ones(1, 1, 1).double()
    got = predictive(Poisson(), mean, variance, samples=samples)
    rates = samples.flatten().exp()
    assert float(got.mean) == pytest.approx(float(rates.mean()))
    y = torch.tensor([[2.0]], dtype=torch.float64)
    want = TorchPoisson(rates).log_prob(y[0]).exp().mean().log()
    torch.testing.assert_close(got.distribution().log_prob(y)[0], want)


def test_defaults_agree_with_the_probit_link_where_both_hold():
    """A Bernoulli by the base class's rule: MacKay's approximation is within 0.02 of it."""
    latent = Latent(MEAN[:, None], VARIANCE[:, None])
    got = Likelihood.predict(Bernoulli(), latent, SIGMA, "probit").mean[:, 0]
    want = (F.sigmoid() @ W)[:, None]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    linked = predictive(Bernoulli(), MEAN, VARIANCE).mean
    torch.testing.assert_close(linked, want, rtol=0, atol=0.02)


def test_preferences_average_over_the_difference_of_rewards():
    """r₁ − r₀ alone counts: its Gaussian by quadrature, for draws of both and the link."""
    mean = torch.tensor([[-1.0, 0.4], [0.3, 0.1]], dtype=torch.float64)
    covariance = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.9, -0.3], [-0.3, 0.6]]]).double()
    along = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    f = (mean @ along)[:, None] + (covariance @ along @ along).sqrt()[:, None] * Z  # (2, 100)
    want = f.sigmoid() @ W
    z = torch.randn(40_000, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    draws = mean + (torch.linalg.cholesky(covariance) @ z[..., None])[..., 0]
    got = predictive(BradleyTerry(), mean, covariance, samples=draws[:, :, None])
    error = ((f.sigmoid().square() @ W - want**2) / 40_000).sqrt()
    assert ((got.probs[:, 1] - want).abs() <= 5 * error).all()
    torch.testing.assert_close(got.distribution().probs, got.probs)
    linked = predictive(BradleyTerry(), mean, covariance).probs
    # MacKay's approximation is within 0.02 of it.
    torch.testing.assert_close(linked[:, 1], want, rtol=0, atol=0.02)


@pytest.mark.parametrize("ratio", [1e-2, 1.0, 12.0])
def test_the_rule_is_as_exact_as_it_says(ratio):
    """Gaussian noise 12 times narrower than the Gaussian: w = 0.98 in 2 exp(-2 pi² w²)."""
    sigma = torch.tensor(0.7 / ratio, dtype=torch.float64)
    latent = Latent(torch.zeros(9, 1, 1).double(), torch.full((9, 1, 1, 1), 0.49).double())
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    got = Likelihood.predict(Gaussian(), latent, sigma, "probit").log_prob(y)
    want = Gaussian().predict(latent, sigma, "probit").log_prob(y)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-8)


@pytest.mark.parametrize("likelihood", [Poisson(), StudentT()])
def test_single_precision_follows(likelihood):
    fine = predictive(likelihood, MEAN, VARIANCE)
    coarse = predictive(likelihood, MEAN.float(), VARIANCE.float())
    y = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(coarse.mean, fine.mean.float())
    got, want = (p.distribution().log_prob(y.to(p.mean)) for p in (coarse, fine))
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    assert coarse.entropy.dtype == coarse.epistemic.dtype == torch.float32
