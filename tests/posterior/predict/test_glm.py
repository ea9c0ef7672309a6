"""The linearised predictive's covariance against J Sigma Jᵀ: J by autograd, Sigma dense."""

import pytest
import torch
from cases import build, case
from posterior import dense
from torch import nn

from kfac_laplace import Laplace

STRUCTURES = ("kron", "diag", "full", "lowrank")
TOL = {"rtol": 1e-9, "atol": 1e-10}  # float64 solves of well-conditioned P, at most 150 dimensions
ONE_ROW = ("mlp-tanh", "mlp-relu-inplace", "mlp-binary", "mlp-regression", "cnn", "vit", "twice")
CONVS = ("conv-1d-stride-dilation", "conv-2d-groups", "conv-2d-depthwise", "conv-2d-circular")
FROZEN = ("frozen-bias", "frozen-weight", "deep-linear-reduce")


def tied():
    """Embedding-like tie: the second layer's weight is the first one's."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.second(self.first(x).tanh()).tanh())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return case(Tied(), (3,), "classification")


def moments(la, x):
    """Mean and covariance of the function values, (n, c) and (n, c, c)."""
    predictive = la.predict(x)
    return predictive.mean_f[:, 0], predictive.covariance


def assert_covariance_is_dense(la, case, sigma=1.0, temperature=1.0):
    j = dense.jacobian(la, case)
    expected = j @ torch.linalg.solve(
        dense.precision(la, case.model, sigma, temperature), j.mT
    )  # (n, k, k)
    mean, covariance = moments(la, case.x)
    torch.testing.assert_close(covariance, expected, **TOL)
    torch.testing.assert_close(mean, case.model(case.x).detach().reshape(mean.shape), **TOL)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("name", ONE_ROW + CONVS + FROZEN)
def test_covariance(name, joint_bias, structure):
    """One output row an example: linear, conv, groups, attention, reuse, norm, position."""
    sigma = 0.6 if build(name).likelihood == "regression" else 1.0
    la, case = dense.fit(
        name,
        hessian_structure=structure,
        joint_bias=joint_bias,
        sigma_noise=sigma,
        temperature=0.7,
    )
    count = la.prior_precision.numel()
    la.prior_precision = torch.linspace(0.5, 3, count, dtype=torch.float64)
    assert_covariance_is_dense(la, case, sigma, 0.7)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "conv-2d-groups", "vit", "deep-linear-reduce"])
def test_covariance_uses_exact_jacobians_in_either_setting(name, setting, structure):
    """The setting approximates H; J of a shared layer is the exact sum over positions."""
    la, case = dense.fit(name, hessian_structure=structure, kfac_approx=setting)
    assert_covariance_is_dense(la, case)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_covariance_of_tied_weights(structure):
    """A tied weight is one parameter: its J is the sum over both uses (a peer counts it twice)."""
    net = tied()
    la = Laplace(net.model, "classification", hessian_structure=structure).fit(net.batches)
    assert_covariance_is_dense(la, net)


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_covariance_with_one_precision_for_each_parameter(structure):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure, prior_structure="diag")
    size = len(dense.theta(la, case.model))
    la.prior_precision = torch.linspace(0.2, 4, size, dtype=torch.float64)
    assert_covariance_is_dense(la, case)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("name", "subset"), [("mlp-tanh", "last_layer"), ("vit", "last_layer"), ("vit", ["mlp.*"])]
)
def test_only_the_subset_is_random(name, subset, structure):
    """The other parameters enter neither P nor J."""
    la, case = dense.fit(name, hessian_structure=structure, subset_of_weights=subset)
    inside = set(dense.covered(la, case.model))
    last = {n for n, _ in case.model.named_parameters() if n.startswith(("head", "2."))}
    assert inside == (last if subset == "last_layer" else {f"mlp.{i}" for i in _MLP})
    assert_covariance_is_dense(la, case)


_MLP = ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_uncovered_parameters_enter_neither_jacobian_nor_prior(structure):
    la, case = dense.fit("vit", hessian_structure=structure, uncovered="freeze")
    # The others cover every parameter; only "kron" has uncovered ones
    expected = {"kron": "frozen", "full": "dense"}
    assert la.coverage["position"] == expected.get(structure, structure)
    assert_covariance_is_dense(la, case)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_joint_covariance_over_inputs(structure):
    """`joint=True` returns the (N C, N C) covariance of all function values."""
    la, case = dense.fit("mlp-regression", hessian_structure=structure, sigma_noise=0.5)
    mean, covariance = la(case.x, joint=True)
    j = dense.jacobian(la, case).flatten(0, 1)  # (n c, p)
    expected = j @ torch.linalg.solve(dense.precision(la, case.model, 0.5), j.T)
    assert mean.numel() == len(j)
    torch.testing.assert_close(mean.flatten(), case.model(case.x).detach().flatten(), **TOL)
    torch.testing.assert_close(covariance, expected, **TOL)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_regression_call_returns_moments_without_noise(structure):
    la, case = dense.fit("mlp-regression", hessian_structure=structure, sigma_noise=2.0)
    mean, covariance = la(case.x)
    assert mean.shape == (7, 2) and covariance.shape == (7, 2, 2)
    expected_mean, expected_covariance = moments(la, case.x)
    torch.testing.assert_close(mean, expected_mean, **TOL)
    torch.testing.assert_close(covariance, expected_covariance, **TOL)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_prediction_does_not_depend_on_the_batch(structure):
    """Chunking and the rows of other inputs leave a prediction alone."""
    la, case = dense.fit("cnn", hessian_structure=structure)
    whole = la(case.x)
    torch.testing.assert_close(torch.cat([la(x[None]) for x in case.x]), whole, **TOL)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["tokens", "tokens-regression"])
def test_token_outputs_have_the_covariance_of_each_position(name, structure):
    """(n, t, c) outputs: a (c, c) covariance for each position, from the exact J of its row."""
    la, case = dense.fit(name, hessian_structure=structure)
    predictive = la.predict(case.x)
    n, t, c = case.model(case.x).shape
    j = dense.jacobian(la, case)  # (n, t c, p)
    full = j @ torch.linalg.solve(dense.precision(la, case.model), j.mT)
    full = full.reshape(n, t, c, t, c)
    expected = torch.stack([full[:, i, :, i] for i in range(t)], 1)  # (n, t, c, c)
    covariance = predictive.covariance
    torch.testing.assert_close(covariance.reshape(n, t, c, c), expected, **TOL)
