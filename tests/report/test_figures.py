"""Scores against scikit-learn, torchmetrics, scipy and closed forms; with weights as by copies."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from kfac_laplace.likelihoods import Heteroscedastic, Latent, Poisson, StudentT
from kfac_laplace.report.marginals import Normals, marginals
from kfac_laplace.report.means import BINS, CHANCE, ClassRows, ValueRows
from kfac_laplace.report.ranks import Told, risk_over_coverage

torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
metrics = pytest.importorskip("sklearn.metrics")
DRAW = torch.Generator()


def drawn(n=200, c=4, seed=0):
    DRAW.manual_seed(seed)
    probs = (3 * torch.randn(n, c, generator=DRAW).double()).softmax(-1)
    return probs, torch.randint(c, (n,), generator=DRAW)


def ones(*counts):
    return [torch.ones(1, n, dtype=torch.float64) for n in counts]


def numbers(figures, *weights):
    return {name: float(value[0]) for name, value in figures(*weights).items()}


def scores(n, m, ties):
    DRAW.manual_seed(1)
    if ties:
        return tuple(torch.randint(k, (s,), generator=DRAW).double() for k, s in ((9, n), (12, m)))
    return torch.randn(n, generator=DRAW).double(), 1 + torch.randn(m, generator=DRAW).double()


# --- classes -------------------------------------------------------------------------------------


def test_scores_of_classes():
    probs, y = drawn()
    got = numbers(ClassRows.of(probs, y).figures, *ones(200))
    ece = torchmetrics.multiclass_calibration_error(probs, y, num_classes=4, n_bins=BINS, norm="l1")
    assert got["ece"] == pytest.approx(float(ece), rel=1e-6)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(y, probs.argmax(1)))
    assert got["nll"] == pytest.approx(metrics.log_loss(y, probs))
    onehot = torch.nn.functional.one_hot(y, 4)
    assert got["brier"] == pytest.approx(float((probs - onehot).square().sum(1).mean()))
    assert got["confidence"] == pytest.approx(float(probs.amax(1).mean()))
    assert got[CHANCE] == pytest.approx(0, abs=1e-12)


def test_a_binary_brier_score_is_twice_that_of_scikit_learn():
    probs, y = drawn(c=2)
    got = numbers(ClassRows.of(probs, y).figures, *ones(200))
    assert got["brier"] == pytest.approx(2 * metrics.brier_score_loss(y, probs[:, 1]))


def test_weights_are_copies():
    """What an example counts twice is what two of it would give; weight 0 is none."""
    probs, y = drawn(60)
    weights = torch.randint(4, (1, 60), generator=DRAW).double()
    copies = weights[0].long()
    again = ClassRows.of(probs.repeat_interleave(copies, 0), y.repeat_interleave(copies))
    got = numbers(ClassRows.of(probs, y).figures, weights)
    want = numbers(again.figures, *ones(int(copies.sum())))
    got.pop(CHANCE), want.pop(CHANCE)
    assert got == pytest.approx(want)


def test_rows_of_one_example_count_together():
    probs, y = drawn(6)
    rows = ClassRows.of(probs, y, torch.tensor([0, 0, 1, 1, 1, 2]))
    weights = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
    kept = torch.tensor([0, 0, 1, 1, 5])
    want = numbers(ClassRows.of(probs[kept], y[kept]).figures, *ones(5))
    got = numbers(rows.figures, weights)
    assert {n: got[n] for n in ("nll", "brier", "aurc", "ece")} == pytest.approx(
        {n: want[n] for n in ("nll", "brier", "aurc", "ece")}
    )


@pytest.mark.parametrize("ties", [False, True])
def test_aurc_is_the_mean_of_error_rates(ties):
    """Over the thresholds that there are, each as often as rows are at it."""
    DRAW.manual_seed(2)
    sure = torch.rand(50, generator=DRAW).double()
    sure = (8 * sure).round() if ties else sure
    wrong = torch.randint(2, (50,), generator=DRAW).double()
    want = np.mean([float(wrong[sure >= one].mean()) for one in sure])
    assert float(risk_over_coverage(sure, wrong, *ones(50))) == pytest.approx(want)


# --- strange inputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_area_and_rate_are_those_of_scikit_learn(ties):
    usual, strange = scores(80, 50, ties)
    DRAW.manual_seed(3)
    u, s = (torch.randint(4, (1, n), generator=DRAW).double() for n in (80, 50))
    got = numbers(Told(usual, strange).figures, u, s)
    both, weights = torch.cat([usual, strange]), torch.cat([u[0], s[0]])
    is_strange = torch.arange(130) >= 80
    area = metrics.roc_auc_score(is_strange, both, sample_weight=weights)
    rates = metrics.roc_curve(~is_strange, -both, sample_weight=weights, drop_intermediate=False)
    passing, usual_passing, _ = rates
    assert got["auroc"] == pytest.approx(area)
    assert got["fpr95"] == pytest.approx(passing[usual_passing >= 0.95 - 1e-12][0])


def test_the_area_is_that_of_torchmetrics():
    usual, strange = scores(50, 30, ties=True)
    want = torchmetrics.binary_auroc(
        torch.cat([usual, strange]) / 12, torch.arange(80).ge(50).int(), thresholds=None
    )
    got = numbers(Told(usual, strange).figures, *ones(50, 30))["auroc"]
    assert got == pytest.approx(float(want), rel=1e-6)


def test_scores_that_part_all():
    got = numbers(Told(torch.arange(3.0), torch.arange(5.0, 9.0)).figures, *ones(3, 4))
    assert got == {"auroc": 1, "fpr95": 0}
    assert numbers(Told(torch.ones(3), torch.ones(4)).figures, *ones(3, 4))["auroc"] == 0.5


# --- values --------------------------------------------------------------------------------------

MEAN = torch.tensor([-0.3, 0.0, 1.2], dtype=torch.float64).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
Y = torch.tensor([0.1, -1.7, 5.0], dtype=torch.float64).reshape(3, 1, 1)


def test_crps_of_normals_is_the_integral():
    got = Normals(MEAN, DEVIATION).crps(Y).flatten()
    for value, m, s, y in zip(*(one.flatten().tolist() for one in (got, MEAN, DEVIATION, Y)),
                              strict=True):  # fmt: skip
        normal = stats.norm(m, s)
        below, _ = integrate.quad(lambda x, n=normal: n.cdf(x) ** 2, -40, y)
        above, _ = integrate.quad(lambda x, n=normal: n.sf(x) ** 2, y, 40)
        assert value == pytest.approx(below + above, rel=1e-6)


def test_intervals_and_ranks_of_normals_are_those_of_scipy():
    normals, by_scipy = Normals(MEAN, DEVIATION), stats.norm(MEAN.numpy(), DEVIATION.numpy())
    for level in (0.5, 0.9, 0.95):
        for got, want in zip(normals.interval(level), by_scipy.interval(level), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(want))
    torch.testing.assert_close(normals.rank(Y), torch.from_numpy(by_scipy.cdf(Y.numpy())))


def test_figures_of_values():
    log_prob = torch.tensor([[-1.0], [-2.0], [-3.0]], dtype=torch.float64)
    rows = ValueRows.of(log_prob, torch.arange(3), Y, MEAN, Normals(MEAN, DEVIATION))
    got = numbers(rows.figures, *ones(3))
    root = metrics.root_mean_squared_error(Y.flatten(), MEAN.flatten())
    assert got["rmse"] == pytest.approx(root) and got["nll"] == pytest.approx(2)
    z = ((Y - MEAN) / DEVIATION).abs()
    for level in (50, 90, 95):
        inside = (z <= stats.norm.ppf((1 + level / 100) / 2)).double().mean()
        assert got[f"coverage_{level}"] == pytest.approx(float(inside))
    width = 2 * stats.norm.ppf(0.95) * float(DEVIATION.mean())
    assert got["sharpness"] == pytest.approx(width)


SIGMA = torch.tensor(0.7, dtype=torch.float64)


def drawn_marginals(likelihood, f):
    """Without variance of f, so that the distribution is scipy's."""
    latent = Latent(f, torch.zeros(*f.shape, f.shape[-1], dtype=f.dtype))
    found = likelihood.predict(latent, SIGMA, "probit")
    return marginals(likelihood, found, latent, SIGMA)


@pytest.mark.parametrize(
    ("likelihood", "f", "law"),
    [
        (StudentT(df=5.0), [0.3], stats.t(5, 0.3, 0.7)),
        (Poisson(), [np.log(4.0)], stats.poisson(4)),
        (Heteroscedastic(), [2.0, np.log(4.0)], stats.norm(0.5, 0.5)),
    ],
    ids=["studentt", "poisson", "heteroscedastic"],
)
def test_distributions_by_draws(likelihood, f, law):
    """999 draws: shares within 4 √(¼/999) = 0.063, CRPS within 4 deviations of |x − y|/√999."""
    n, y = 20, 1.0
    found = drawn_marginals(likelihood, torch.tensor(f, dtype=torch.float64).expand(n, 1, -1))
    target = torch.full((n, 1, 1), y, dtype=torch.float64)
    rank = 0.5 * (law.cdf(y) + law.cdf(y - 1e-9))
    assert float((found.rank(target) - rank).abs().max()) < 0.063
    if law.dist.name == "poisson":
        k = np.arange(60)
        crps = ((law.cdf(k) - (k >= y)) ** 2).sum()
    else:
        crps = integrate.quad(lambda x: law.cdf(x) ** 2, -60, y)[0]
        crps += integrate.quad(lambda x: law.sf(x) ** 2, y, 60)[0]
    assert float((found.crps(target) - crps).abs().max()) < 4 * law.std() / 999**0.5
    low, high = found.interval(0.9)
    inside = torch.from_numpy(law.cdf(high.numpy()) - law.cdf(low.numpy() - 1e-9))
    assert float(inside.min()) > 0.9 - 0.045  # 4 √(0.09 · 0.9 / 999) is 0.038


def test_draws_hold_what_the_posterior_adds():
    """Var y of a Student-t with a Gaussian over its location: both variances."""
    f = torch.zeros(1, 1, 1, dtype=torch.float64)
    likelihood, latent = StudentT(df=5.0), Latent(f, torch.full((1, 1, 1, 1), 4.0).double())
    found = likelihood.predict(latent, SIGMA, "probit")
    low, high = marginals(likelihood, found, latent, SIGMA).interval(0.5)
    draws = stats.norm(0, 2).rvs(200_000, random_state=0)
    draws = draws + stats.t(5, 0, 0.7).rvs(200_000, random_state=1)
    want = np.quantile(draws, 0.75) - np.quantile(draws, 0.25)
    assert float(high - low) == pytest.approx(want, rel=0.15)
