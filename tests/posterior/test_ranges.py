"""Ranges of hyperparameters move on where there is more to gain, and end where there is not."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner

METHODS = ("marglik", "mackay")


def rows(n: int = 40) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(n: int = 40) -> Tensor:
    return torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(2))


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def zero_biases() -> nn.Sequential:
    model = network()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [1e-12, 1e12])
def test_a_start_that_is_too_far_off_is_no_lack_of_a_maximum(start, method, caplog):
    """The range moves on with the search where there is more to gain."""
    la = Laplace(network(), prior_precision=start).fit([(rows(), labels())])
    near = Laplace(network()).fit([(rows(), labels())])
    for each in (la, near):
        each.optimize_prior(method)
    assert la.prior_precision.tolist() == pytest.approx(near.prior_precision.tolist(), rel=1e-3)
    assert not warned(caplog)


def least_squares(kind: str) -> tuple[nn.Linear, Tensor, Tensor]:
    """Targets in dollars, or inputs in millions, and the weights of least squares."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    noise = torch.randn(200, 1, dtype=torch.float64, generator=generator)
    slopes = torch.tensor([[5.0], [3.0], [-2.0]], dtype=torch.float64)
    y = 2e5 + 1e4 * x @ slopes + 1e4 * noise if kind == "targets" else x @ slopes + 0.1 * noise
    x = x if kind == "targets" else 1e6 * x
    model = nn.Linear(3, 1, bias=kind == "targets").double()
    full = torch.cat([x, torch.ones(200, 1).double()], 1) if kind == "targets" else x
    found = torch.linalg.lstsq(full, y).solution
    with torch.no_grad():
        model.weight.copy_(found[:3].T)
        if kind == "targets":
            model.bias.copy_(found[3])
    return model, x, y


@pytest.mark.parametrize("kind", ["targets", "inputs"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", ["kron", "full"])
def test_maxima_beyond_the_range_are_found(structure, method, kind, caplog):
    """The stationary point of the dense evidence, by iterating δ = γ/‖θ‖², σ² = RSS/(N − γ)."""
    model, x, y = least_squares(kind)
    la = Laplace(model, "regression", hessian_structure=structure).fit([(x, y)])
    la.optimize_prior(method)
    full = torch.cat([x, torch.ones(200, 1).double()], 1) if kind == "targets" else x
    values = torch.linalg.eigvalsh(full.T @ full)
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    rss = float((model(x) - y).detach().square().sum())
    delta, variance = 1.0, rss / 200
    for _ in range(200):
        gamma = float((values / (values + delta * variance)).sum())
        delta, variance = gamma / float(theta.square().sum()), rss / (200 - gamma)
    assert not 1e-8 <= delta <= 1e8
    assert float(la.prior_precision) == pytest.approx(delta, rel=1e-4)
    assert float(la.sigma_noise) == pytest.approx(math.sqrt(variance), rel=1e-5)
    assert not warned(caplog)


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_what_has_nothing_to_gain_stays(method, structure, caplog):
    """A second call changes nothing of zero biases, and says the same of them."""
    la = Laplace(
        zero_biases(), joint_bias=False, hessian_structure=structure, prior_structure="diag"
    ).fit([(rows(), labels())])
    la.optimize_prior(method)
    first, zero = la.prior_precision.clone(), la.posterior.squares == 0
    assert int(zero.sum()) == 7
    for _ in range(2):
        la.optimize_prior(method)
    assert torch.equal(la.prior_precision[zero], first[zero])
    said = [text for text in warned(caplog) if "0.bias" in text]
    assert len(said) == 3 and len(set(said)) == 1
    assert "equals the prior mean" in said[0] and "no curvature" not in said[0]


def test_a_tuner_goes_on_where_the_range_is_no_end(caplog):
    tuner = MarglikTuner(
        network(), "classification", 40, prior_precision=1e-12, n_hypersteps=100, lr_hyp=1.0
    )
    for _ in range(3):
        tuner.step([(rows(), labels())])
    assert float(tuner.hyperparameters()["prior_precision"].min()) > 0.1
    assert not [text for text in warned(caplog) if "prior precision" in text]
