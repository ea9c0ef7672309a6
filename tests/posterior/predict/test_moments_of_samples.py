"""Mean and covariance of predictives by samples: the unbiased moments of a few draws."""

from __future__ import annotations

import pytest
import torch
from posterior import dense
from torch import Tensor

from kfac_laplace.likelihoods import Gaussian
from kfac_laplace.posterior.predict.predictive import from_samples

ONE = torch.ones((), dtype=torch.float64)
#: The same few sums of numbers of order one, in another order.
ROUNDING = {"rtol": 1e-13, "atol": 1e-14}

types = pytest.mark.parametrize("pred_type", ["nn", "linear"])
counts = pytest.mark.parametrize("n_samples", [2, 3, 5])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def covariances(rows: Tensor) -> Tensor:
    """torch.cov of samples (s, m, c), for each of the m rows by itself."""
    return torch.stack([torch.cov(row.T) for row in rows.unbind(1)])


def test_three_samples_whose_moments_are_whole_numbers():
    """(0, 6), (3, 3), (6, 0): variances 18/2 = 9, covariance −9; and two samples of one number."""
    samples = torch.tensor([[[0, 6]], [[3, 3]], [[6, 0]]], dtype=torch.float64)
    predictive = from_samples(Gaussian(), samples, -1, ONE)
    assert torch.equal(predictive.mean, torch.tensor([[3, 3]], dtype=torch.float64))
    want = torch.tensor([[[9, -9], [-9, 9]]], dtype=torch.float64)
    assert torch.equal(predictive.covariance, want)
    two = from_samples(Gaussian(), torch.tensor([[[1.0]], [[5.0]]]).double(), -1, ONE)
    assert float(two.covariance) == 8.0  # (4 + 4)/(2 − 1)


def test_one_sample_has_no_covariance():
    samples = torch.randn(1, 4, 2).double()
    predictive = from_samples(Gaussian(), samples, -1, ONE)
    assert torch.equal(predictive.mean, samples[0])
    assert not predictive.covariance.any() and predictive.covariance.shape == (4, 2, 2)


@counts
@types
def test_the_moments_of_the_functions_drawn(pred_type, n_samples):
    """Those of `functional_samples` from a generator in the same state."""
    la, case = dense.fit("mlp-regression", sigma_noise=0.7)
    predictive = la.predict(case.x, pred_type, n_samples=n_samples, generator=generator())
    f = la.functional_samples(case.x, n_samples, pred_type=pred_type, generator=generator())
    assert f.shape == (n_samples, 7, 2)
    want = covariances(f)
    torch.testing.assert_close(predictive.mean, f.sum(0) / n_samples, **ROUNDING)
    torch.testing.assert_close(predictive.covariance, want, **ROUNDING)
    # The noise joins in once, beside the covariance of the functions.
    noisy = want + 0.7**2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(predictive.distribution().covariance_matrix, noisy, **ROUNDING)
    mean, covariance = la(case.x, pred_type, n_samples=n_samples, generator=generator())
    assert torch.equal(mean, predictive.mean) and torch.equal(covariance, predictive.covariance)


@counts
def test_the_moments_of_networks_at_sampled_weights(n_samples):
    """The weights put into the network by hand."""
    la, case = dense.fit("mlp-regression")
    predictive = la.predict(case.x, "nn", n_samples=n_samples, generator=generator())
    outputs = []
    for row in la.sample(n_samples, generator=generator()):
        torch.nn.utils.vector_to_parameters(row, case.model.parameters())
        outputs.append(case.model(case.x).detach())
    # The network is evaluated in another way: batched products, a few hundred ε.
    torch.testing.assert_close(
        predictive.covariance, covariances(torch.stack(outputs)), rtol=1e-12, atol=1e-13
    )


@types
def test_each_token_has_a_covariance_of_its_own(pred_type):
    """Outputs (n, t, c): (n, t, c, c), tokens beside each other."""
    la, case = dense.fit("tokens")
    predictive = la.predict(case.x, pred_type, n_samples=3, generator=generator())
    f = la.functional_samples(case.x, 3, pred_type=pred_type, generator=generator())
    want = covariances(f.flatten(1, 2)).unflatten(0, f.shape[1:3])
    torch.testing.assert_close(predictive.covariance, want, **ROUNDING)
    torch.testing.assert_close(predictive.mean_f, f.sum(0) / 3, **ROUNDING)
