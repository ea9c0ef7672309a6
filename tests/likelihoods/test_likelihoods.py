"""Log-densities, scores, curvature roots and draws against torch.distributions and autograd."""

import pytest
import torch
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Normal

from kfac_laplace import Bernoulli, Categorical, Gaussian
from kfac_laplace.errors import InvalidType, InvalidValue

ONE = torch.ones((), dtype=torch.float64)
SIGMA = torch.tensor(0.7, dtype=torch.float64)


def outputs(n=5, t=3, c=4, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, t, c, dtype=torch.float64, generator=generator)


def targets(likelihood, f, seed=1):
    return likelihood.sample(f, torch.Generator().manual_seed(seed))


LIKELIHOODS = {"categorical": Categorical(), "gaussian": Gaussian(), "bernoulli": Bernoulli()}
each = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS.keys())


def reference_log_prob(likelihood, f, y, sigma):
    if isinstance(likelihood, Categorical):
        return CategoricalDistribution(logits=f).log_prob(y).flatten(1).sum(1)
    if isinstance(likelihood, Gaussian):
        return Normal(f, sigma).log_prob(y).flatten(1).sum(1)
    return BernoulliDistribution(logits=f).log_prob(y).flatten(1).sum(1)


@each
def test_log_prob_is_the_normalised_sum_over_positions_and_outputs(likelihood):
    f = outputs()
    y = targets(likelihood, f)
    sigma = SIGMA if likelihood.has_noise else ONE
    torch.testing.assert_close(
        likelihood.log_prob(f, y, sigma), reference_log_prob(likelihood, f, y, sigma)
    )


@each
def test_summed_statistic_gives_the_log_likelihood_at_any_sigma(likelihood):
    """The data are read once; sigma moves afterwards without another pass."""
    f = outputs()
    y = targets(likelihood, f)
    statistic = likelihood.statistic(f[:2], y[:2]) + likelihood.statistic(f[2:], y[2:])
    for sigma in (ONE, SIGMA):
        got = likelihood.log_likelihood(statistic, f.numel(), sigma)
        torch.testing.assert_close(got, likelihood.log_prob(f, y, sigma).sum())


@each
def test_statistic_is_float64_for_low_precision_outputs(likelihood):
    f = outputs()
    y = targets(likelihood, f)
    low = y.float() if y.is_floating_point() else y
    assert likelihood.statistic(f.float(), low).dtype == torch.float64


@each
def test_score_and_hessian_are_the_derivatives_of_the_log_density(likelihood):
    f = outputs(n=2, t=1)
    y = targets(likelihood, f)

    def loss(row, label):
        return -likelihood.log_prob(row[None, None], label, ONE).sum()

    for n in range(2):
        row = f[n, 0].clone().requires_grad_()
        label = y[n : n + 1]
        (score,) = torch.autograd.grad(loss(row, label), row)
        torch.testing.assert_close(likelihood.score(f[n : n + 1], label)[0, 0], score)
        hessian = torch.autograd.functional.hessian(lambda r, label=label: loss(r, label), row)
        torch.testing.assert_close(likelihood.hessian(f[n : n + 1])[0, 0], hessian)


@each
@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0, 300.0])
def test_roots_rebuild_the_hessian(likelihood, spread):
    """Also where tails underflow: 1 - cumsum instead of a reverse cumsum fails at spread 30."""
    f = outputs(spread=spread)
    columns = list(likelihood.roots(f))
    rank = 3 if isinstance(likelihood, Categorical) else 4
    assert len(columns) == rank
    rebuilt = sum(s[..., :, None] * s[..., None, :] for s in columns)
    torch.testing.assert_close(rebuilt, likelihood.hessian(f), rtol=1e-13, atol=5e-16)


@each
def test_draws_have_the_likelihoods_moments(likelihood):
    """E over y of score scoreᵀ is the curvature: the law behind the Monte-Carlo Fisher."""
    n = 40_000
    f = outputs(n=1, t=1, c=3).expand(n, 1, 3)
    scores = likelihood.score(f, targets(likelihood, f))[:, 0]
    products = scores[:, :, None] * scores[:, None, :]
    error = (products.mean(0) - likelihood.hessian(f[:1])[0, 0]).abs()
    assert (error <= 5 * products.std(0) / n**0.5).all()  # five standard errors
    assert (scores.mean(0).abs() <= 5 * scores.std(0) / n**0.5).all()


@each
def test_draws_follow_the_generator_and_leave_the_global_one(likelihood):
    f, state = outputs(n=50), torch.get_rng_state()
    first, again, other = (targets(likelihood, f, seed=s) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_gaussian_scales_its_curvature_by_the_noise():
    assert Gaussian().has_noise and not Categorical().has_noise and not Bernoulli().has_noise
    torch.testing.assert_close(Gaussian().precision(SIGMA), 1 / SIGMA**2)
    assert Categorical().precision(SIGMA) == 1 and Bernoulli().precision(SIGMA) == 1


@pytest.mark.parametrize(
    ("output", "target", "axis"),
    [
        ((2, 5, 3), (2, 5), -1),
        ((2, 3, 5), (2, 5), 1),
        ((2, 3, 4, 4), (2, 4, 4), 1),
        ((2, 3), (2,), -1),
    ],
)
def test_class_axis_is_last_where_the_shapes_say_so_else_torchs_own(output, target, axis):
    got = Categorical().class_axis(torch.zeros(output), torch.zeros(target, dtype=torch.long))
    assert got == axis


def test_aligned_outputs_put_positions_in_order_whatever_the_class_axis():
    f = outputs(n=2, t=6, c=3)
    dense = f.unflatten(1, (2, 3)).movedim(-1, 1)  # (n, c, h, w)
    torch.testing.assert_close(Categorical().align(dense, 1), f)
    torch.testing.assert_close(Categorical().align(f, -1), f)
    assert Bernoulli().align(torch.zeros(4), -1).shape == (4, 1, 1)
    assert Gaussian().align(torch.zeros(4, 2), -1).shape == (4, 1, 2)


@pytest.mark.parametrize(
    ("likelihood", "target", "error", "says"),
    [
        (Categorical(), torch.zeros(5), InvalidType, "integers"),
        (Categorical(), torch.zeros(5, dtype=torch.bool), InvalidType, "integers"),
        (Categorical(), torch.full((5,), 3), InvalidValue, r"0\.\.2"),
        (Categorical(), torch.full((5,), -1), InvalidValue, r"0\.\.2"),
        (Categorical(), torch.zeros(4, dtype=torch.long), InvalidValue, "5 examples"),
        (Gaussian(), torch.zeros(5, 3, dtype=torch.long), InvalidType, "floating"),
        (Gaussian(), torch.zeros(5), InvalidValue, "5 examples"),  # would broadcast
        (Gaussian(), torch.zeros(5, 1), InvalidValue, "5 examples"),
        (Gaussian(), torch.full((5, 3), torch.inf), InvalidValue, "non-finite"),
        (Bernoulli(), torch.full((5, 3), 1.5), InvalidValue, r"outside \[0, 1\]"),
        (Bernoulli(), torch.zeros(4, 3), InvalidValue, "5 examples"),
    ],
)
def test_bad_targets_are_refused_with_what_was_got(likelihood, target, error, says):
    with pytest.raises(error, match=says):
        likelihood.align_target(target, outputs(t=1, c=3))


def test_a_softmax_over_one_class_points_to_the_binary_likelihood():
    with pytest.raises(InvalidValue, match="binary"):
        Categorical().align_target(torch.zeros(5, dtype=torch.long), outputs(t=1, c=1))
