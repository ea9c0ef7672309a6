"""The scale that calibration finds, where it is known: one residual, or targets on the mean."""

from __future__ import annotations

import math

import pytest
import torch
from posterior import dense
from torch import Tensor, nn

from kfac_laplace import Laplace

SIGMA, DELTA = 0.4, 0.5
#: The smallest κ > 0 that the search looks at, and then up to where it ends.
KAPPAS = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3]


def linear_gaussian() -> tuple[Laplace, Tensor, Tensor, Tensor]:
    """A linear model at its exact posterior; a new input, f's mean there and its variance."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(9, 3, dtype=torch.float64, generator=draw)
    y = torch.randn(9, 1, dtype=torch.float64, generator=draw)
    new = torch.randn(1, 3, dtype=torch.float64, generator=draw)
    precision = x.T @ x / SIGMA**2 + DELTA * torch.eye(3)
    weight = torch.linalg.solve(precision, x.T @ y / SIGMA**2).T
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weight)
    options = {"prior_precision": DELTA, "sigma_noise": SIGMA, "hessian_structure": "full"}
    la = Laplace(model, "regression", **options).fit([(x, y)])
    return la, new, new @ weight.T, new @ torch.linalg.solve(precision, new.T)


@pytest.mark.parametrize("residual", [0.0, 0.3, 0.9, 1.2, 3.0, 10.0])
def test_the_scale_of_one_held_out_point(residual):
    """−log N(r | 0, κv + σ²) is least at κ = (r² − σ²)/v, and at 0 where that is negative.

    Args:
        residual: r in units of σ.
    """
    la, x, mean, variance = linear_gaussian()
    la.calibrate([(x, mean + residual * SIGMA)], method="validation")
    want = (residual**2 - 1) * SIGMA**2 / float(variance)
    if want < 0:
        assert float(la.posterior_scale) == 0.0
    else:
        assert KAPPAS[0] < want < KAPPAS[-1]
        # The search stops within 1e-4 of log κ.
        assert float(la.posterior_scale) == pytest.approx(want, rel=1e-4)


def test_targets_on_the_mean_leave_nothing_of_the_covariance():
    """Several outputs: ½ log det(κΣ + σ²) is all that κ changes, and it grows with κ."""
    la, case = dense.fit("mlp-regression", sigma_noise=0.6)
    mean = case.model(case.x).detach()
    j = dense.jacobian(la, case)
    covariance = j @ torch.linalg.solve(dense.precision(la, case.model, 0.6), j.mT)
    noise = 0.36 * torch.eye(2, dtype=torch.float64)
    losses = [float(torch.logdet(kappa * covariance + noise).sum()) for kappa in (0.0, *KAPPAS)]
    assert losses == sorted(set(losses))  # also the first two are told apart
    la.calibrate([(case.x, mean)], method="validation")
    assert float(la.posterior_scale) == 0.0
    got_mean, got_covariance = la(case.x)
    torch.testing.assert_close(got_mean, mean)
    assert not got_covariance.any()


def test_labels_that_the_mode_gets_right_leave_nothing_of_the_covariance():
    """Two classes: a label on the logit's side loses −log sigmoid(|f|/√(1 + π/8 κv))."""
    la, case = dense.fit("mlp-binary")
    f = case.model(case.x).detach()
    j = dense.jacobian(la, case)
    variance = (j @ torch.linalg.solve(dense.precision(la, case.model), j.mT))[..., 0]
    shrunk = [f.abs() / (1 + math.pi / 8 * kappa * variance).sqrt() for kappa in (0.0, *KAPPAS)]
    losses = [float(nn.functional.softplus(-logit).sum()) for logit in shrunk]
    assert losses == sorted(set(losses))
    la.calibrate([(case.x, (f > 0).double())], method="validation")
    assert float(la.posterior_scale) == 0.0
    tau = la.predictive_temperature
    assert tau < 1  # surer yet
    torch.testing.assert_close(la(case.x).flatten(), (f / tau).sigmoid().flatten())
