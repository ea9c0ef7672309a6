"""Poisson, Student-t, heteroscedastic Gaussian, preferences: density, score, curvature, draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.distributions import Poisson as TorchPoisson
from torch.distributions import StudentT as TorchStudentT

from kfac_laplace import (
    BradleyTerry,
    Heteroscedastic,
    KfacLaplaceError,
    Likelihood,
    Poisson,
    StudentT,
)
from kfac_laplace.errors import InvalidType, InvalidValue

ONE = torch.ones((), dtype=torch.float64)
SIGMA = torch.tensor(0.7, dtype=torch.float64)
LIKELIHOODS = {
    "poisson": Poisson(),
    "studentt": StudentT(df=3.5),
    "heteroscedastic": Heteroscedastic(),
    "reward_modeling": BradleyTerry(),
}
each = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def outputs(n=5, t=3, c=4, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, t, c, dtype=torch.float64, generator=generator)


def outputs_of(likelihood, targets=2, **options):
    """Outputs for so many targets a row; of preferences for the one that a pair has."""
    if isinstance(likelihood, BradleyTerry):
        return outputs(c=2, **options)
    return outputs(c=targets * (2 if isinstance(likelihood, Heteroscedastic) else 1), **options)


def targets(likelihood, f, seed=1):
    return likelihood.sample(f, torch.Generator().manual_seed(seed))


def torchs_own(likelihood: Likelihood, f: Tensor, sigma: Tensor):
    """The density by torch, with parameters written down anew."""
    if likelihood is LIKELIHOODS["poisson"]:
        return TorchPoisson(f.exp())
    if likelihood is LIKELIHOODS["studentt"]:
        return TorchStudentT(3.5, f, sigma)
    if likelihood is LIKELIHOODS["reward_modeling"]:
        return Bernoulli(logits=f[..., 1] - f[..., 0])
    half = f.shape[-1] // 2
    first, second = f[..., :half], -0.5 * f[..., half:].exp()  # natural parameters
    return Normal(-first / (2 * second), (-2 * second).rsqrt())


@each
def test_log_prob_is_the_normalised_sum_over_positions_and_outputs(likelihood):
    f = outputs_of(likelihood)
    y = targets(likelihood, f)
    assert y.shape == ((5, 3) if isinstance(likelihood, BradleyTerry) else (5, 3, 2))
    sigma = SIGMA if likelihood.has_noise else ONE
    want = torchs_own(likelihood, f, sigma).log_prob(y.to(f)).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(f, y, sigma), want)
    torch.testing.assert_close(likelihood.rows(f, sigma).log_prob(y).sum(1), want)


@each
def test_summed_statistic_gives_the_log_likelihood_at_any_sigma(likelihood):
    f = outputs_of(likelihood)
    y = targets(likelihood, f)
    statistic = likelihood.statistic(f[:2], y[:2]) + likelihood.statistic(f[2:], y[2:])
    assert statistic.dtype == torch.float64
    for sigma in (ONE, SIGMA, 1e-4 * ONE, 1e4 * ONE):
        got = likelihood.log_likelihood(statistic, f.numel(), sigma)
        if not likelihood.has_noise:
            sigma = ONE
        torch.testing.assert_close(got, likelihood.log_prob(f, y, sigma).sum(), rtol=1e-12, atol=0)


@each
def test_scores_are_gradients_of_the_log_density(likelihood):
    f = outputs_of(likelihood).requires_grad_()
    y = targets(likelihood, f.detach())
    for sigma in (ONE, SIGMA) if likelihood.has_noise else (ONE,):
        log_prob = torchs_own(likelihood, f, sigma).log_prob(y.to(f)).sum()
        (gradient,) = torch.autograd.grad(-log_prob, f)
        torch.testing.assert_close(likelihood.score_with_noise(f, y, sigma), gradient)
    torch.testing.assert_close(
        likelihood.score(f.detach(), y), Likelihood.score(likelihood, f.detach(), y)
    )


@each
@pytest.mark.parametrize("spread", [0.0, 1.5, 10.0])
def test_roots_rebuild_the_hessian(likelihood, spread):
    f = outputs_of(likelihood, spread=spread)
    hessian = likelihood.hessian(f)
    for columns in (likelihood.roots(f), Likelihood.roots(likelihood, f)):
        rebuilt = sum(s[..., :, None] * s[..., None, :] for s in columns)
        # eigenvectors are found to an error relative to the whole matrix
        error = (rebuilt - hessian).flatten(2).norm(dim=-1) / hessian.flatten(2).norm(dim=-1)
        assert error.max() < 1e-13
    assert (
        torch.linalg.eigvalsh(hessian) >= -1e-12 * hessian.abs().amax((-1, -2))[..., None]
    ).all()


def quadrature(likelihood: Likelihood, f: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Values y (k,) of one target and their weights p(y | f) dy, which add up to one."""
    u = torch.linspace(-14, 14, 4001, dtype=torch.float64)
    step = u[1] - u[0]
    if likelihood is LIKELIHOODS["poisson"]:
        y, steps = torch.arange(0.0, 400, dtype=torch.float64), ONE
    elif likelihood is LIKELIHOODS["reward_modeling"]:
        y, steps = torch.arange(2), ONE
    elif likelihood is LIKELIHOODS["studentt"]:  # heavy tails: steps that grow
        y, steps = f[0] + u.sinh(), u.cosh() * step
    else:
        spread = (-f[1] / 2).exp()
        y, steps = f[0] * (-f[1]).exp() + spread * u, spread * step
    weights = torchs_own(likelihood, f, sigma).log_prob(y[:, None].to(f))[:, 0].exp() * steps
    torch.testing.assert_close(weights.sum(), ONE)
    return y, weights


@each
@pytest.mark.parametrize("seed", range(3))
def test_the_curvature_is_the_expected_square_of_the_score(likelihood, seed):
    """E score = 0 and E score scoreᵀ = Λ, by sums over counts or quadrature over values."""
    f = outputs_of(likelihood, 1, n=1, t=1, seed=seed)[0, 0]
    for sigma in (ONE, SIGMA) if likelihood.has_noise else (ONE,):
        y, weights = quadrature(likelihood, f, sigma)
        rows = f.expand(len(y), 1, -1)
        observed = y[:, None] if isinstance(likelihood, BradleyTerry) else y[:, None, None]
        scores = likelihood.score_with_noise(rows, observed, sigma)[:, 0]
        torch.testing.assert_close(weights @ scores, torch.zeros_like(f), rtol=0, atol=1e-9)
        got = torch.einsum("k,kc,kd->cd", weights, scores, scores)
        want = likelihood.precision(sigma) * likelihood.hessian(f[None, None])[0, 0]
        # the tails beyond the last value hold e^-14 to the power of 1 + df of the probability
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@each
def test_the_curvature_is_the_expected_hessian_of_the_loss(likelihood):
    """The information equality; for Poisson each y has the same Hessian, so that one will do."""
    f = outputs_of(likelihood, 1, n=1, t=1)[0, 0]
    y, weights = quadrature(likelihood, f, ONE)
    if likelihood is LIKELIHOODS["poisson"]:
        y, weights = y[3:4], torch.ones(1, dtype=torch.float64)
    elif len(y) > 2:
        y, weights = y[::8], 8 * weights[::8]
    hessians = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda row, v=v: -torchs_own(likelihood, row, ONE).log_prob(v.to(row)).sum(), f
            )
            for v in y
        ]
    )
    got = (weights[:, None, None] * hessians).sum(0)
    torch.testing.assert_close(got, likelihood.hessian(f[None, None])[0, 0], rtol=1e-8, atol=1e-8)


@each
def test_draws_have_the_likelihoods_moments(likelihood):
    """E over y of score scoreᵀ is the curvature: the law behind the Monte-Carlo Fisher."""
    n = 40_000
    f = outputs_of(likelihood, n=1, t=1).expand(n, 1, -1)
    scores = likelihood.score(f, targets(likelihood, f))[:, 0]
    products = scores[:, :, None] * scores[:, None, :]
    error = (products.mean(0) - likelihood.hessian(f[:1])[0, 0]).abs()
    assert (error <= 5 * products.std(0) / n**0.5).all()  # five standard errors
    assert (scores.mean(0).abs() <= 5 * scores.std(0) / n**0.5).all()


@each
def test_draws_follow_the_generator_and_leave_the_global_one(likelihood):
    f, state = outputs_of(likelihood, n=50), torch.get_rng_state()
    first, again, other = (targets(likelihood, f, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_student_t_scales_its_curvature_by_a_noise():
    assert [kind.has_noise for kind in LIKELIHOODS.values()] == [False, True, False, False]
    torch.testing.assert_close(StudentT().precision(SIGMA), 1 / SIGMA**2)
    assert Poisson().precision(SIGMA) == 1 and Heteroscedastic().precision(SIGMA) == 1
    assert not any(kind.has_gaussian_noise for kind in LIKELIHOODS.values())


def test_many_degrees_of_freedom_are_gaussian_noise():
    """The t distribution of 1e6 degrees of freedom is normal up to a term of order 1e-6."""
    f, y = outputs(), outputs(seed=7)
    got = StudentT(df=1e6).log_prob(f, y, SIGMA)
    want = Normal(f, SIGMA).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        StudentT(df=1e6).hessian(f), torch.eye(4).double().expand(5, 3, 4, 4), rtol=1e-5, atol=0
    )


def test_a_rate_that_underflows_keeps_its_digits():
    """log p(2 | f = -800) is -1600 - log 2; a rate of zero would make it minus infinity."""
    f = torch.full((1, 1, 1), -800.0, dtype=torch.float64)
    got = Poisson().log_prob(f, torch.full_like(f, 2.0), ONE)
    assert float(got) == pytest.approx(-1600 - torch.log(torch.tensor(2.0)).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("likelihood", "target", "says"),
    [
        (Poisson(), torch.full((5, 4), -1), "support"),
        (Poisson(), torch.full((5, 4), 0.5), "support"),
        (Poisson(), torch.full((5, 4), torch.inf), "non-finite"),
        (Poisson(), torch.ones(5), "do not match"),  # would broadcast
        (Poisson(), torch.ones(5, 1), "do not match"),
        (StudentT(), torch.full((5, 4), torch.nan), "non-finite"),
        (StudentT(), torch.ones(4, 4), "do not match"),
        (Heteroscedastic(), torch.ones(5, 4), "do not match"),  # half as wide
    ],
)
def test_bad_targets_are_refused_with_what_was_got(likelihood, target, says):
    with pytest.raises(InvalidValue, match=says):
        likelihood.align_target(target, outputs(t=1))


def test_an_odd_number_of_natural_parameters_is_refused():
    with pytest.raises(InvalidValue, match="two outputs"):
        Heteroscedastic().align_target(torch.ones(5, 1), outputs(t=1, c=3))


@pytest.mark.parametrize(
    ("output", "target"), [((4, 3, 2), (4, 2, 3)), ((4, 3, 2), (3, 4, 2)), ((4, 3), (3, 4))]
)
def test_axes_in_another_order_are_refused(output, target):
    with pytest.raises(InvalidValue, match="do not match"):
        Poisson().class_axis(torch.zeros(output), torch.zeros(target))


@pytest.mark.parametrize(("df", "error"), [(1.0, InvalidValue), (-2.0, InvalidValue)])
def test_degrees_of_freedom_leave_a_mean(df, error):
    with pytest.raises(error, match="df"):
        StudentT(df=df)
    with pytest.raises(InvalidType, match="df"):
        StudentT(df="many")
    assert issubclass(error, KfacLaplaceError)
