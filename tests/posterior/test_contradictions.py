"""Claims are not contradicted by their own numbers, and records by what no data know."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.errors import KfacLaplaceError
from kfac_laplace.likelihoods import Gaussian, Heteroscedastic, Poisson


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def trained(model: nn.Module, x: Tensor, y: Tensor, loss, steps: int = 300) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model


def mlp(outputs: int = 1, inputs: int = 1, width: int = 16) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(width, outputs)).double()


def sine(n: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    return x, (2 * x).sin() + 0.02 * torch.randn(n, 1, dtype=torch.float64, generator=draws(1))


def blobs(n: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    centres = 1.5 * torch.randn(classes, 4, dtype=torch.float64, generator=draws(1))
    y = torch.randint(0, classes, (n,), generator=draws(2))
    return centres[y] + torch.randn(n, 4, dtype=torch.float64, generator=draws(3)), y


@pytest.mark.parametrize("offset", [0.0, 1e8, -1e10])
@pytest.mark.parametrize("kind", ["gaussian", "heteroscedastic"])
def test_the_spread_keeps_its_digits_at_any_offset(kind, offset):
    """Merged in batches, scaled and pooled: as torch has it of all targets together."""
    y = offset + torch.randn(30, 1, 2, dtype=torch.float64, generator=draws(7)).round(decimals=2)
    likelihood = Gaussian() if kind == "gaussian" else Heteroscedastic()
    sums = likelihood.target_sums(y[:1], y[:1])
    for part in (y[1:4], y[4:4], y[4:]):
        sums = likelihood.joined_sums(sums, likelihood.target_sums(part, part))
    exact = y.flatten(0, 1) - offset
    torch.testing.assert_close(sums[0], torch.full((2,), 30.0).double())
    torch.testing.assert_close(sums[2] / 30, exact.var(0, correction=0), rtol=1e-6, atol=0)
    assert torch.equal(likelihood.scaled_sums(sums, 0.5)[1], sums[1])
    pooled = likelihood.pooled_sums(likelihood.scaled_sums(sums, 0.5))
    want = exact.var(correction=0)
    torch.testing.assert_close(pooled[2, 0] / pooled[0, 0], want, rtol=1e-6, atol=0)
    if kind == "gaussian":
        assert likelihood.target_spread(sums) ** 2 == pytest.approx(
            float(exact.var(0, correction=0).mean()), rel=1e-6
        )


@pytest.mark.parametrize("kind", ["poisson", "heteroscedastic"])
def test_further_likelihoods_know_their_best_constant(kind):
    """By torch's own densities at the moments of each output, over two batches."""
    rates = torch.full((40, 2), 3.0, dtype=torch.float64)
    y = torch.poisson(rates, generator=draws(3))
    likelihood = Poisson() if kind == "poisson" else Heteroscedastic()
    parts = [likelihood.target_sums(part[:, None], part[:, None]) for part in (y[:15], y[15:])]
    got = likelihood.constant_log_likelihood(likelihood.joined_sums(*parts))
    best = (
        torch.distributions.Poisson(y.mean(0))
        if kind == "poisson"
        else torch.distributions.Normal(y.mean(0), y.std(0, correction=0))
    )
    assert got == pytest.approx(float(best.log_prob(y).sum()), rel=1e-12)


@pytest.mark.parametrize("rounds", [1, 4])
def test_no_network_is_dead_before_it_could_learn(rounds, caplog):
    x, y = blobs(60)
    tuner = MarglikTuner(mlp(3, 4, 8), "classification", 60, prior_precision=1e6)
    for _ in range(rounds):
        tuner.step([(x, y)])
    assert not [text for text in warned(caplog) if "no better" in text]


def test_a_slow_network_is_not_blamed_on_its_prior(caplog):
    """Worse than a constant, but its data determine its directions: no layer is named."""
    x, y = sine(60)
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.bias.fill_(5.0)
    tuner = MarglikTuner(model, "regression", 60)
    for _ in range(12):
        tuner.step([(x, y)])
    said = [text for text in warned(caplog) if "no better than a constant" in text]
    assert len(said) == 1
    assert "Train further" in said[0] and "prior" not in said[0]


def test_a_network_better_than_a_constant_is_not_called_one(caplog):
    """By a thousandth of a nat, with all its prior against it."""
    y = torch.tensor([0] * 20 + [1] * 40)
    x = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1e-4]]))
        model.bias.copy_(torch.tensor([0.0, math.log(2)]))
    frequencies = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    constant = float(60 * (frequencies * frequencies.log()).sum())
    assert -float(F.cross_entropy(model(x), y, reduction="sum").detach()) > constant + 1e-4
    tuner = MarglikTuner(model, "classification", 60, prior_precision=1e6, lr_hyp=1e-9)
    for _ in range(12):
        tuner.step([(x, y)])
    assert not [text for text in warned(caplog) if "no better" in text]


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
def test_gamma_of_a_fixed_noise_and_of_full_curvature(structure, caplog):
    x, y = sine(12)
    model = trained(mlp(), x, y, F.mse_loss)
    la = Laplace(model, "regression", hessian_structure=structure, sigma_noise=1e-3).fit([(x, y)])
    la.optimize_prior(fix_sigma_noise=True)
    said = [text for text in warned(caplog) if "directions" in text]
    if structure in ("full", "lowrank"):
        assert not said
    else:
        assert "fix_sigma_noise" not in said[0] and "noise" not in said[0]


@pytest.mark.parametrize("tolerance", [-1.0, 0.0, math.nan, math.inf, "small"])
def test_a_tolerance_is_a_positive_number(tolerance):
    x, y = blobs(12)
    la = Laplace(mlp(3, 4, 4)).fit([(x, y)])
    with pytest.raises(KfacLaplaceError, match="tolerance"):
        la.optimize_prior(tolerance=tolerance)


def test_rounds_are_not_ranked_by_unused_parameters():
    """∫ over the prior is 1 wherever they stand: as if they were frozen."""

    class Spare(nn.Module):
        def __init__(self, used: bool):
            super().__init__()
            self.net = mlp(3, 4, 4)
            self.spare = nn.Parameter(torch.full((4,), 30.0).double(), requires_grad=used)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    x, y = blobs(40)
    found = []
    for used in (True, False):
        tuner = MarglikTuner(
            Spare(used), "classification", 40, prior_structure="scalar", prior_precision=0.01
        )
        for _ in range(3):
            tuner.step([(x, y)])
        found.append(
            [(record.evidence, record.scatter, record.objective) for record in tuner.history]
        )
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]))
