"""Outputs far from the data: right values where there are any, otherwise errors that name them."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Heteroscedastic, Laplace, Poisson
from kfac_laplace.errors import InvalidValue

ONE = torch.ones((), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rates(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()[:, None, None]


@pytest.mark.parametrize("rate", [3.0, 1e3, 9.9e9, 1.01e10, 1e15, 1e18, 1e20, 1e26])
@pytest.mark.parametrize("how", ["sample", "draws", "distribution"])
def test_counts_of_any_rate_have_its_mean_and_variance(how, rate):
    """4000 draws: five standard errors of the mean, and of the variance."""
    f, n = rates(rate).expand(4000, 1, 1), 4000
    rate = float(f[0].exp())  # the logarithm is rounded
    likelihood = Poisson()
    if how == "distribution":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y = likelihood.distribution(f, ONE).sample()
    else:
        draw = likelihood.sample if how == "sample" else likelihood.predictive_draws
        y = draw(f, *(() if how == "sample" else (ONE,)), generator())
    assert bool((y >= 0).all()) and bool((y == y.round()).all())
    unit = (y - rate) / math.sqrt(rate)
    assert abs(float(unit.mean())) < 5 / math.sqrt(n)
    assert abs(float(unit.square().mean()) - 1) < 5 * math.sqrt((2 + 1 / rate) / n)


@pytest.mark.parametrize("shift", [-3.0, -1e-3, 0.0, 0.5, 4.0])
@pytest.mark.parametrize("rate", [0.1, 30.0, 9.9e4, 1.01e5, 1e7, 1e12, 1e18, 1e24])
def test_the_probability_of_counts_keeps_its_digits(rate, shift):
    """y log λ − λ − log y! in 80 digits, where those of float64 are gone at 1e16."""
    y = max(0.0, round(rate + shift * math.sqrt(rate)))
    f, value = rates(rate), torch.tensor([[[y]]], dtype=torch.float64)
    with mpmath.workdps(80):
        exact = mpmath.mpf(float(f.exp()))
        want = mpmath.mpf(y) * mpmath.log(exact) - exact - mpmath.loggamma(mpmath.mpf(y) + 1)
    got = float(Poisson().rows(f, ONE).log_prob(value))
    # y and λ are rounded to float64: their difference in deviations, √λ eps, enters once.
    assert got == pytest.approx(float(want), abs=1e-9 + 10 * math.sqrt(rate) * 2.2e-16)


def test_no_count_has_the_infinite_rate():
    f = torch.tensor([[[800.0]], [[1.0]]], dtype=torch.float64)
    y = torch.tensor([[[0.0]], [[2.0]]], dtype=torch.float64)
    assert Poisson().rows(f, ONE).log_prob(y)[0] == -math.inf
    for draw in (
        lambda: Poisson().sample(f, generator()),
        lambda: Poisson().predictive_draws(f, ONE, generator()),
        lambda: Poisson().distribution(f, ONE).sample(),
    ):
        with pytest.raises(InvalidValue, match=r"rate e\^f.*1 of 2 infinite in torch.float64"):
            draw()


@pytest.mark.parametrize("pred_type", ["glm", "linear", "nn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictives_of_huge_rates(pred_type, dtype):
    """Entropies are those of a Gaussian of variance λ, wider by the spread of λ."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).to(dtype)
    x, y = torch.randn(8, 3).to(dtype), torch.ones(8, 1)
    with torch.no_grad():
        model.bias.fill_(50.0)
        model.weight.zero_()
    la = Laplace(model, "poisson").fit([(x, y)])
    predictive = la.predict(x, pred_type=pred_type)
    gaussian = 0.5 * math.log(2 * math.pi * math.e * math.exp(50))
    assert bool((predictive.entropy > gaussian - 0.5).all())
    assert bool((predictive.entropy < gaussian + 25).all())
    assert bool((predictive.epistemic >= -1e-5).all())  # rounding in float32
    drawn = la.predictive_samples(x, 5, pred_type=pred_type)
    assert bool((drawn > 0).all()) and bool(torch.isfinite(drawn).all())


@pytest.mark.parametrize("s", [250.0, -250.0, 1000.0])
def test_natural_parameters_beyond_single_precision_are_named(s):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 1)
    with torch.no_grad():
        model.bias[1] = s
    for fisher in ("exact", "mc", "empirical"):
        with pytest.raises(InvalidValue, match=r"deviation e\^\(−s/2\).*torch.float32.*targets"):
            Laplace(model, "heteroscedastic", fisher=fisher).fit([(x, y)])


def test_natural_parameters_that_double_precision_holds():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(8, 3).double()
    with torch.no_grad():
        model.bias[1] = 250.0
    a, s = model(x).detach().chunk(2, -1)
    y = a * (-s).exp()
    la = Laplace(model, "heteroscedastic").fit([(x, y)])
    torch.testing.assert_close(la.log_likelihood, 0.5 * (s - math.log(2 * math.pi)).sum())


@pytest.mark.parametrize("s", [-3000.0, -800.0, 0.3, 800.0, 1600.0])
def test_the_density_holds_where_moments_are_no_numbers(s):
    """log N(y | a e^−s, e^−s) by its natural parameters, in 80 digits."""
    f = torch.tensor([[[0.7, s]]], dtype=torch.float64)
    rows = Heteroscedastic().rows(f, ONE)
    with mpmath.workdps(80):
        a, e = mpmath.mpf(0.7), mpmath.exp(mpmath.mpf(s))
        want = (mpmath.mpf(s) - e * (mpmath.mpf(0.25) - a / e) ** 2 - mpmath.log(2 * mpmath.pi)) / 2
    got = float(rows.log_prob(torch.tensor([[[0.25]]], dtype=torch.float64)))
    assert got == (pytest.approx(float(want)) if abs(want) < 1e300 else -math.inf)
    assert float(rows.entropy()) == pytest.approx(0.5 * (1 + math.log(2 * math.pi) - s))
    wider = rows.expand((3, *rows.batch_shape))
    assert (
        wider.log_prob(torch.tensor(0.25, dtype=torch.float64).expand(3, 1, 1, 1)).unique() == got
    )


@pytest.mark.parametrize("name", ["poisson", "heteroscedastic"])
@pytest.mark.parametrize("method", ["loo", "validation"])
def test_a_wide_posterior_can_be_calibrated(name, method):
    """Its draws reach rates and precisions beyond float64: they have no probability, and no NaN."""
    torch.manual_seed(0)
    outputs = 2 if name == "heteroscedastic" else 1
    model, x = nn.Linear(3, outputs).double(), torch.randn(6, 3).double()
    y = torch.ones(6, 1).double()
    la = Laplace(model, name, prior_precision=1e-5).fit([(x, y)])
    with torch.no_grad():
        loader = [(10 * x, y)] if method == "validation" else None
        kappa = float(la.calibrate(loader, method=method).posterior_scale)
    assert math.isfinite(kappa) and kappa >= 0
