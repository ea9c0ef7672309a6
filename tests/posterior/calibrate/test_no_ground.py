"""Leave-one-out that says nothing moves no scale: it stays, and a warning names the remedy."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from cases import build
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.likelihoods import Bernoulli, Categorical, Gaussian
from kfac_laplace.posterior.calibrate.held_out import HeldOut
from kfac_laplace.posterior.calibrate.scale import adopted_scale, best_scale

ONE = torch.ones((), dtype=torch.float64)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def points(mean: Tensor, target: Tensor, variance: float = 1.0) -> HeldOut:
    """Outputs (n, c) of n points with independent errors."""
    mean = mean.double()[:, None]
    covariance = variance * torch.eye(mean.shape[-1]).double().expand(*mean.shape, -1)
    return HeldOut(mean, covariance, target)


def wrong(c: int, target: Tensor) -> Tensor:
    """Logits sure of a wrong class three times in four."""
    sure = 6.0 * torch.nn.functional.one_hot((target[:, 0] + 1) % c, c).double()
    sure[::4] = 6.0 * torch.nn.functional.one_hot(target[::4, 0], c).double()
    return sure


CLASSES = torch.arange(12)[:, None] % 3
ZEROS = torch.zeros(12, 1, 1).double()
#: name: likelihood, left-out points worse than nothing at every κ
WORSE = {
    "classes": (Categorical(), points(wrong(3, CLASSES), CLASSES, 1e-8)),
    "weights": (Categorical(weight=[1.0, 2.0, 3.0]), points(wrong(3, CLASSES), CLASSES, 1e-8)),
    "ignored": (
        Categorical(),
        points(wrong(3, CLASSES), torch.where(CLASSES == 0, -100, CLASSES), 1e-8),
    ),
    "binary": (Bernoulli(), points(torch.full((12, 1), 9.0), ZEROS, 1e-8)),
    "regression": (
        Gaussian(),
        points(torch.full((12, 1), 1e4), torch.linspace(-1, 1, 12).double()[:, None, None], 1e-8),
    ),
}


@pytest.mark.parametrize("before", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kind", WORSE)
def test_worse_than_nothing(kind, before, caplog):
    likelihood, left_out = WORSE[kind]
    got = adopted_scale(likelihood, left_out, ONE, method="loo", before=before)
    assert got == before
    (said,) = warned(caplog)
    assert "validation" in said and f"κ stays {before:.3g}" in said
    caplog.clear()
    got = adopted_scale(likelihood, left_out, ONE, method="validation", before=before)
    assert got == best_scale(likelihood, left_out, ONE)  # held-out data are what they are


@pytest.mark.parametrize(("error", "variance"), [(0.0, 1.0), (3.0, 1e-6)])
def test_an_end_of_the_range(error, variance, caplog):
    """Targets on the mean ask for κ = 0, errors far beyond tiny variances for more than 1000."""
    y = torch.linspace(-100, 100, 12).double()[:, None]
    left_out = points(y, (y + error)[:, None], variance)
    assert adopted_scale(Gaussian(), left_out, ONE, method="loo", before=0.7) == 0.7
    (said,) = warned(caplog)
    assert "end of the range" in said and "validation" in said
    caplog.clear()
    got = adopted_scale(Gaussian(), left_out, ONE, method="validation", before=0.7)
    if error:
        assert got > 900
    else:
        assert got == 0.0
        assert not warned(caplog)  # the mode


def test_the_lower_end_is_said_as_it_is(caplog):
    """Targets so near the mean ask for a κ that no digit after the point would show."""
    y = torch.linspace(-100, 100, 12).double()[:, None]
    error = math.sqrt(1 + 8e-3)  # κ = (r² − σ²)/v = 8e-7: below the grid, above 0
    left_out = points(y, (y + error)[:, None], 1e4)
    got = adopted_scale(Gaussian(), left_out, ONE, method="validation", before=0.7)
    assert got == pytest.approx(1e-6)
    (said,) = warned(caplog)
    assert ", 1e-06: the points fit no scale" in said


def test_a_good_scale_is_adopted(caplog):
    """−log N(r | 0, κv + σ²) is least at κ = (r² − σ²)/v."""
    y = torch.linspace(-1, 1, 12).double()[:, None]
    left_out = points(y, (y + 3)[:, None], 2.0)
    got = adopted_scale(Gaussian(), left_out, ONE, method="loo", before=1.0)
    assert got == pytest.approx((9 - 1) / 2, rel=1e-3)
    assert not caplog.records


def test_random_labels_that_a_network_has_learned_by_heart(caplog):
    """Through the facade: leave-one-out believes the fit, and asks for no covariance at all."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 3).double(), torch.randint(0, 3, (30,))
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1
    la = Laplace(model).fit([(x, y)])
    la.posterior_scale = 0.4
    assert la.calibrate() is la
    assert float(la.posterior_scale) == 0.4
    (said,) = warned(caplog)
    assert "its best κ, 0, is an end of the range" in said


def test_random_labels_that_a_network_has_not_learned(caplog):
    """Labels against the network's own opinion: worse than log 3, as the warning says."""
    case = build("mlp-tanh")
    batches = [(x, (2 * case.model(x)).argmin(1)) for x, _ in case.batches]
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(3)
    la = Laplace(case.model, prior_precision=100.0).fit(batches).calibrate()
    assert float(la.posterior_scale) == 1.0
    (said,) = warned(caplog)
    assert f"{math.log(3):.4g} of a constant" in said


def test_likelihoods_without_a_constant_have_the_range_alone():
    case = build("mlp-tanh")
    la = Laplace(case.model, "poisson").fit([(x, torch.ones(len(x), 3)) for x, _ in case.batches])
    la.calibrate()
    assert float(la.posterior_scale) >= 0
