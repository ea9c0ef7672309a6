"""A rank for every row beside laplace-torch's `FunctionalLaplace`: the same GP on the same points.

They divide the prior precision by N/M for M of N points; the GP then is ours fitted to the M points
with N/M times the precision. Of classes they keep the diagonal of Λ alone, which is another model.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peers import peer
from torch import nn

from kfac_laplace import Laplace, LowRank

TOL = {"rtol": 1e-6, "atol": 1e-6}
DELTA, SIGMA = 1.7, 0.6


def both(model, points, n=24, outputs=2):
    """Theirs on M of N points, ours on the same M, and all inputs."""
    x, y = peer.data("regression", 5, outputs=outputs, n=n)
    theirs = peer.laplace.FunctionalLaplace(
        model,
        "regression",
        n_subset=points,
        sigma_noise=SIGMA,
        prior_precision=DELTA,
        backend=peer.BACKENDS["curvlinops"],
    )
    theirs.fit(peer.loader(x, y))
    chosen = theirs.train_loader.sampler.indices
    ours = Laplace(
        model,
        "regression",
        hessian_structure=LowRank(points * outputs),
        prior_structure="scalar",
        prior_precision=DELTA * n / points,
        sigma_noise=SIGMA,
    ).fit([(x[chosen], y[chosen])])
    return theirs, ours, x


@pytest.mark.parametrize("points", [6, 24])
def test_predictions_of_regression(points):
    model = peer.mlp(outputs=2)
    theirs, ours, x = both(model, points)
    assert float(ours.curvature.blocks["lowrank"].dropped) == 0
    new = torch.cat([x[:3], x[-3:] + 0.5])
    predictive = ours.predict(new)
    mean, variance = theirs._glm_predictive_distribution(new)
    torch.testing.assert_close(predictive.mean, mean, **TOL)
    torch.testing.assert_close(predictive.covariance, variance, **TOL)
    _, joint = theirs._glm_predictive_distribution(new, joint=True)
    torch.testing.assert_close(ours(new, joint=True)[1], joint, **TOL)


@pytest.mark.parametrize("points", [6, 24])
def test_the_log_determinant_of_the_evidence(points):
    """Theirs is of K + σ²I, ours of I + K/σ²."""
    theirs, ours, _ = both(peer.mlp(outputs=2), points)
    noise = 2 * points * 2 * math.log(SIGMA)
    torch.testing.assert_close(theirs.log_det_ratio.squeeze() - noise, ours.log_det_ratio, **TOL)


@pytest.mark.parametrize("points", [6, 24])
def test_the_evidence_of_a_linear_model_at_its_mode(points):
    """Both are log N(y; 0, J Jᵀ/δ + σ²I) there, by an expansion at θ* and by a GP.

    Their property adds the log-likelihood at θ* to that of the GP; the GP's alone is put together
    here.
    """
    x, y = peer.data("regression", 5, outputs=1, n=24)
    model = peer.seeded(lambda: nn.Linear(5, 1))
    theirs, _, _ = both(model, points, outputs=1)
    chosen = theirs.train_loader.sampler.indices
    rows = torch.cat([x, torch.ones(24, 1, dtype=torch.float64)], 1)[chosen]
    delta = DELTA * 24 / points
    precision = rows.mT @ rows / SIGMA**2 + delta * torch.eye(6, dtype=torch.float64)
    mode = torch.linalg.solve(precision, rows.mT @ y[chosen] / SIGMA**2)
    with torch.no_grad():
        model.weight.copy_(mode[:5].T)
        model.bias.copy_(mode[5])
    theirs, ours, _ = both(model, points, outputs=1)
    squares = theirs.scatter.squeeze()
    evidence = -0.5 * (squares + theirs.log_det_ratio.squeeze() + points * math.log(2 * math.pi))
    torch.testing.assert_close(ours.log_marginal_likelihood(), evidence, **TOL)


def test_changing_the_precision_keeps_the_factor():
    theirs, ours, x = both(peer.mlp(outputs=2), 6)
    theirs.prior_precision = 0.3
    ours.prior_precision = 0.3 * 24 / 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs says that it computes again
        theirs._refresh_posterior()
    variance = theirs._glm_predictive_distribution(x[:4])[1]
    torch.testing.assert_close(ours.predict(x[:4]).covariance, variance, **TOL)
