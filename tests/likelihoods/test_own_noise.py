"""A likelihood with a noise of the user's own: by gradient, never by MacKay's Gaussian formula."""

from __future__ import annotations

import math

import pytest
import torch
from cases import build
from torch.distributions import Normal

from kfac_laplace import Gaussian, Laplace, Likelihood, MarglikTuner
from kfac_laplace.errors import UnsupportedUse


class HalfVariance(Likelihood):
    """N(y | f, sigma^2 / 2): the Gaussian under another name for its noise, curvature 2."""

    has_noise = True

    def distribution(self, f, sigma):
        return Normal(f, sigma / 2**0.5)

    def statistic(self, f, y):
        return 2 * (y - f).square().sum()

    def log_likelihood(self, statistic, count, sigma):
        return -0.5 * statistic / sigma**2 - 0.5 * count * (math.pi * sigma**2).log()

    def hessian(self, f):
        return 2 * Gaussian().hessian(f)

    def precision(self, sigma):
        return sigma**-2


def fitted(likelihood, **options):
    case = build("mlp-regression")
    return Laplace(case.model, likelihood, **options).fit(case.batches)


def test_the_gradient_finds_the_same_noise_under_its_other_name():
    half, plain = fitted(HalfVariance()), fitted("regression")
    for la in (half, plain):
        la.optimize_prior()
    # both stop where no component of the gradient exceeds 1e-5 nats
    torch.testing.assert_close(
        half.log_marginal_likelihood(), plain.log_marginal_likelihood(), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(half.sigma_noise, 2**0.5 * plain.sigma_noise, rtol=1e-4, atol=0)


def test_mackay_refuses_to_fit_it():
    la = fitted(HalfVariance(), sigma_noise=0.6)
    with pytest.raises(UnsupportedUse, match="HalfVariance: .*method='marglik'"):
        la.optimize_prior("mackay")
    assert float(la.sigma_noise) == 0.6 and (la.prior_precision == 1).all()


def test_mackay_fits_the_prior_beside_a_fixed_noise():
    la, other = fitted(HalfVariance(), sigma_noise=0.6), fitted(HalfVariance(), sigma_noise=0.6)
    la.optimize_prior("mackay", fix_sigma_noise=True)
    other.optimize_prior("marglik", fix_sigma_noise=True)
    assert float(la.sigma_noise) == pytest.approx(0.6, abs=1e-12)
    torch.testing.assert_close(
        la.log_marginal_likelihood(), other.log_marginal_likelihood(), rtol=0, atol=1e-6
    )


def test_a_tuner_by_mackay_refuses_and_is_left_as_it_was():
    case = build("mlp-regression")
    tuner = MarglikTuner(case.model, HalfVariance(), 7, method="mackay")
    with pytest.raises(UnsupportedUse, match="HalfVariance"):
        tuner.step(case.batches)
    assert not tuner.history and float(tuner.hyperparameters()["sigma_noise"]) == 1
    fixed = MarglikTuner(case.model, HalfVariance(), 7, method="mackay", fix_sigma_noise=True)
    assert fixed.step(case.batches) is not None


def test_mackay_fits_subclasses_of_the_gaussian():
    class Named(Gaussian):
        pass

    found = [fitted(lik, sigma_noise=0.3).optimize_prior("mackay") for lik in (Named(), Gaussian())]
    assert float(found[0].sigma_noise) == float(found[1].sigma_noise) != 0.3
