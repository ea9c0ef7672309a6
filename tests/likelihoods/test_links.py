"""Links from a Gaussian over logits to probabilities, against the integral."""

import math

import pytest
import torch
from torch import Tensor

from kfac_laplace.likelihoods.links import MODERATE, averaged, bridge, centred, probit


def gaussians(c: int, variance: float, n: int = 40) -> tuple[Tensor, Tensor]:
    """Random means and covariances whose largest centred variance is given."""
    draw = torch.Generator().manual_seed(c)
    a = torch.randn(n, c, c, dtype=torch.float64, generator=draw)
    a[: n // 2, :, c // 2 :] *= 0.1  # some of nearly lower rank
    covariance = a @ a.mT
    centre = torch.eye(c, dtype=torch.float64) - 1 / c
    largest = (centre @ covariance @ centre).diagonal(dim1=-2, dim2=-1).amax(-1)
    mean = math.sqrt(variance) * torch.randn(n, c, dtype=torch.float64, generator=draw)
    return mean, covariance * (variance / largest)[:, None, None]


def integral(mean: Tensor, covariance: Tensor, n: int = 20_000) -> Tensor:
    """E softmax by plain draws in antithetic pairs."""
    draw = torch.Generator().manual_seed(7)
    z = torch.randn(n, mean.shape[-1], dtype=torch.float64, generator=draw)
    jitter = 1e-10 * torch.eye(mean.shape[-1], dtype=torch.float64)
    moved = z @ torch.linalg.cholesky(covariance + jitter).mT  # (rows, n, c)
    both = torch.cat([mean[:, None] + moved, mean[:, None] - moved], 1)
    return both.softmax(-1).mean(1)


@pytest.mark.parametrize("c", [2, 3, 10])
def test_centred_is_the_probit_of_centred_logits(c):
    mean, covariance = gaussians(c, 3.0)
    centre = torch.eye(c, dtype=torch.float64) - 1 / c
    variance = (centre @ covariance @ centre).diagonal(dim1=-2, dim2=-1)
    want = (mean @ centre) / (1 + math.pi / 8 * variance).sqrt()
    torch.testing.assert_close(centred(mean, covariance), want)


def test_centred_does_not_see_a_shift_common_to_all_logits():
    mean, covariance = gaussians(4, 1.0)
    moved = centred(mean + 5, covariance + 100.0)
    torch.testing.assert_close(moved, centred(mean, covariance), rtol=1e-9, atol=1e-9)
    assert (probit(mean, covariance + 100.0) - probit(mean, covariance)).abs().max() > 0.1


def test_one_logit_has_the_plain_probit():
    mean, covariance = torch.randn(5, 1).double(), torch.rand(5, 1, 1).double()
    torch.testing.assert_close(centred(mean, covariance), probit(mean, covariance))


@pytest.mark.slow
@pytest.mark.parametrize("c", [2, 3, 10])
@pytest.mark.parametrize("variance", [0.1, 0.3, 1.0])
def test_moderate_variances_take_the_closed_form_near_the_integral(c, variance):
    """Errors as `MODERATE` says them: 0.006, 0.015 and 0.04 on average, 0.12 at worst at 1."""
    assert variance <= MODERATE
    mean, covariance = gaussians(c, 0.999 * variance)
    got = averaged(mean, covariance, 100, seed=0)
    torch.testing.assert_close(got, centred(mean, covariance).softmax(-1))
    error = (got - integral(mean, covariance)).abs().amax(-1)
    assert error.mean() < {0.1: 0.01, 0.3: 0.02, 1.0: 0.05}[variance]
    assert error.max() < {0.1: 0.03, 0.3: 0.06, 1.0: 0.12}[variance]


@pytest.mark.slow
@pytest.mark.parametrize("c", [2, 3, 10])
@pytest.mark.parametrize("variance", [3.0, 30.0, 300.0])
def test_large_variances_take_points_that_stay_near_the_integral(c, variance):
    """Where the centred probit is too sure."""
    mean, covariance = gaussians(c, variance)
    want = integral(mean, covariance)
    got = averaged(mean, covariance, 100, seed=0)
    torch.testing.assert_close(got.sum(-1), torch.ones(len(got), dtype=torch.float64))
    error = (got - want).abs().amax(-1).mean()
    closed = (centred(mean, covariance).softmax(-1) - want).abs().amax(-1).mean()
    assert error < 0.05 < closed


def test_the_step_from_one_to_the_other_is_none():
    mean, covariance = gaussians(5, MODERATE)
    below, above = (averaged(mean, f * covariance, 100, 0) for f in (1 - 1e-9, 1 + 1e-9))
    torch.testing.assert_close(below, above, rtol=0, atol=1e-4)  # √(1 − m/v) of the points


def test_what_is_said_of_a_row_does_not_depend_on_others():
    mean, covariance = gaussians(3, 20.0)
    covariance = covariance * torch.logspace(-3, 1, len(mean), dtype=torch.float64)[:, None, None]
    together = averaged(mean, covariance, 64, seed=3)
    alone = [averaged(mean[n : n + 1], covariance[n : n + 1], 64, seed=3) for n in range(len(mean))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-14)
    assert not torch.equal(together, averaged(mean, covariance, 64, seed=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_comes_back_as_it_was(dtype):
    mean, covariance = (part.to(dtype) for part in gaussians(3, 20.0))
    got = averaged(mean, covariance, 64, seed=0)
    assert got.dtype == dtype and torch.isfinite(got).all()


def test_no_variance_leaves_the_mode():
    mean, _ = gaussians(3, 1.0)
    nothing = torch.zeros(len(mean), 3, 3, dtype=torch.float64)
    torch.testing.assert_close(averaged(mean, nothing, 10, 0), mean.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [2, 3, 5])
def test_the_bridge_of_one_direction_of_logits_is_certain(c, dtype):
    """Σ = v w wᵀ: their sum determines all logits. What is left of variances is rounding alone."""
    draw = torch.Generator().manual_seed(c)
    w = torch.randn(50, c, dtype=torch.float64, generator=draw)
    h = torch.randn(50, 1, dtype=torch.float64, generator=draw)
    mean = h * w + torch.linspace(-1, 1, c, dtype=torch.float64)  # adds up to h Σ w
    want = (mean - h * w).softmax(-1).to(dtype)
    covariance = (0.7 * w[:, :, None] * w[:, None, :]).to(dtype)
    got = bridge(mean.to(dtype), covariance)
    well = (w.sum(-1).abs() > 0.3).nonzero()[:, 0]  # where Σ w is no difference of large numbers
    assert len(well) > 30
    near = {"rtol": 0, "atol": 1e-3 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(got[well], want[well], **near)


@pytest.mark.parametrize("seed", range(5))
def test_the_bridge_does_not_know_the_order_of_classes(seed):
    mean, covariance = gaussians(5, 2.0)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    got = bridge(mean[:, order], covariance[:, order][:, :, order])
    torch.testing.assert_close(got, bridge(mean, covariance)[:, order])
