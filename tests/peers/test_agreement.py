"""Where laplace-torch is right, ours is the same to 1e-6: factors, evidence, predictive.

Plain MLP and CNN, float64, separate biases (laplace-torch's convention), K-FAC-expand.
"""

import pytest
import torch
from peers import peer

from kfac_laplace import Laplace

STRUCTURES = ("kron", "diag", "full")
TOL = {"rtol": 1e-6, "atol": 1e-6}
SETTINGS = {
    "mlp": (peer.mlp, "classification", (5,)),
    "mlp-regression": (lambda: peer.mlp(outputs=2), "regression", (5,)),
    "cnn": (peer.cnn, "classification", (2, 6, 6)),
}

backends = pytest.mark.parametrize("backend", peer.BACKENDS)
settings = pytest.mark.parametrize("setting", SETTINGS)
structures = pytest.mark.parametrize("structure", STRUCTURES)


def both(setting, structure, backend, **options):
    """Theirs and ours, fitted to the same batches of unequal size, and the inputs."""
    make, likelihood, shape = SETTINGS[setting]
    model = make()
    x, y = peer.data(likelihood, *shape, outputs=2 if likelihood == "regression" else 3)
    theirs = peer.fit(model, likelihood, peer.loader(x, y), structure, backend=backend, **options)
    ours = Laplace(
        model,
        likelihood,
        hessian_structure=structure,
        kfac_approx="expand",
        joint_bias=False,
        **options,
    ).fit(peer.loader(x, y))
    return theirs, ours, x


def precisions(ours):
    """One value for each parameter tensor, all different."""
    return torch.linspace(0.5, 4, len(ours.curvature.blocks), dtype=torch.float64)


@backends
@settings
def test_kronecker_factors(setting, backend):
    """B (x) A of each tensor; for regression laplace-torch spreads the loss's 1/2 over both."""
    theirs, ours, _ = both(setting, "kron", backend)
    blocks = list(ours.curvature.blocks.values())
    assert len(blocks) == len(theirs.H_facs.kfacs)
    for block, factors in zip(blocks, theirs.H_facs.kfacs, strict=True):
        expected = torch.kron(*factors) if len(factors) == 2 else factors[0]
        torch.testing.assert_close(block.dense(), expected, **TOL)
        if setting != "mlp-regression":
            torch.testing.assert_close(block.factors.output[0], factors[0], **TOL)
        if setting != "mlp-regression" and len(factors) == 2:
            torch.testing.assert_close(block.factors.input[0], factors[1], **TOL)


@backends
@structures
@settings
def test_log_marginal_likelihood(setting, structure, backend):
    """With one precision for each tensor, and sigma or temperature away from 1.

    Not both: under a temperature laplace-torch tempers the squares but not the normaliser of the
    Gaussian, so that its evidence does not belong to likelihood^(1/T).
    """
    options = {"sigma_noise": 0.6} if setting == "mlp-regression" else {"temperature": 0.7}
    theirs, ours, _ = both(setting, structure, backend, **options)
    delta = precisions(ours) if structure != "full" else torch.tensor(1.7, dtype=torch.float64)
    expected = theirs.log_marginal_likelihood(delta)
    torch.testing.assert_close(ours.log_marginal_likelihood(delta), expected.squeeze(), **TOL)
    torch.testing.assert_close(ours.log_det_ratio, theirs.log_det_ratio.squeeze(), **TOL)
    torch.testing.assert_close(ours.scatter, theirs.scatter.squeeze(), **TOL)


@backends
@structures
@settings
def test_glm_predictive(setting, structure, backend):
    """Probit probabilities, or mean and covariance."""
    theirs, ours, x = both(setting, structure, backend)
    delta = precisions(ours) if structure != "full" else torch.tensor(1.7, dtype=torch.float64)
    theirs.prior_precision = delta
    ours.prior_precision = delta
    expected, got = theirs(x[:5]), ours(x[:5], link_approx="probit")
    if setting == "mlp-regression":
        for want, have in zip(expected, got, strict=True):
            torch.testing.assert_close(have, want, **TOL)
        return
    torch.testing.assert_close(got, expected, **TOL)
    _, covariance = theirs._glm_predictive_distribution(x[:5])
    torch.testing.assert_close(ours.predict(x[:5]).covariance, covariance, **TOL)


@structures
def test_bridge_link(structure):
    theirs, ours, x = both("mlp", structure, "curvlinops")
    theirs.prior_precision = ours.prior_precision = torch.tensor(1.7, dtype=torch.float64)
    torch.testing.assert_close(
        ours(x, link_approx="bridge"), theirs(x, link_approx="bridge"), **TOL
    )


@structures
def test_joint_regression_covariance(structure):
    theirs, ours, x = both("mlp-regression", structure, "curvlinops")
    theirs.prior_precision = ours.prior_precision = torch.tensor(1.7, dtype=torch.float64)
    expected_mean, expected = theirs(x[:4], joint=True)
    mean, covariance = ours(x[:4], joint=True)
    torch.testing.assert_close(covariance, expected, **TOL)
    torch.testing.assert_close(mean.flatten(), expected_mean.flatten(), **TOL)
