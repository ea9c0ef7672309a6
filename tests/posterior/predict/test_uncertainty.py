"""Variances of y, scores by name, and values by position, against plain Monte-Carlo."""

import math

import pytest
import torch
from posterior import dense
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue


def drawn_outputs(la, x, n=100_000):
    """Outputs from N(f, Σ) by a Cholesky factor, (n, rows, c)."""
    predictive = la.predict(x)
    torch.manual_seed(4)
    f, covariance = predictive.mean_f, predictive.covariance_f
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(f.shape[-1]))
    return f + (root @ torch.randn(n, *f.shape, 1, dtype=f.dtype))[..., 0]


def close(found, want, n=2000):
    """Both are averages over draws of values below one."""
    torch.testing.assert_close(found, want, rtol=0, atol=4 / math.sqrt(n))


def test_variances_of_classes():
    la, case = dense.fit("mlp-tanh")
    p = drawn_outputs(la, case.x).softmax(-1)[:, :, 0]
    parts = la.predict(case.x, n_samples=5000).variances
    close(parts.epistemic, p.var(0), 5000 * 4)
    close(parts.aleatoric, (p * (1 - p)).mean(0), 5000 * 4)
    labels = torch.distributions.Categorical(probs=p).sample()
    onehot = nn.functional.one_hot(labels, 3).double()
    close(parts.total, onehot.var(0), 5000)
    assert (parts.epistemic > 0.01).any()


def test_variances_of_values():
    la, case = dense.fit("mlp-regression", sigma_noise=0.6)
    parts = la.predict(case.x).variances
    variance = la(case.x)[1].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(parts.epistemic, variance)
    torch.testing.assert_close(parts.total, variance + 0.36)
    normal = la.predict(case.x).distribution()
    torch.testing.assert_close(parts.total, normal.variance)


def counts():
    torch.manual_seed(0)
    x, y = torch.randn(8, 2).double(), torch.arange(8.0)[:, None].double() % 3
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return Laplace(model, "poisson", prior_precision=5.0).fit([(x, y)]), x


def test_variances_of_counts_in_closed_form():
    """E[λ] = exp(m + v/2), and Var λ = (eᵛ − 1) E[λ]² of a lognormal rate."""
    la, x = counts()
    predictive = la.predict(x)
    m, v = predictive.mean_f[:, 0], predictive.covariance_f[:, 0, 0]
    rate = (m + v / 2).exp()
    torch.testing.assert_close(predictive.variances.aleatoric, rate, rtol=1e-6, atol=1e-9)
    want = v.expm1() * rate.square()
    torch.testing.assert_close(predictive.variances.epistemic, want, rtol=1e-6, atol=1e-9)


def test_scores_by_name():
    la, case = dense.fit("mlp-tanh")
    predictive = la.predict(case.x, link_approx="probit")
    for name in ("entropy", "epistemic"):
        torch.testing.assert_close(predictive.score(name), getattr(predictive, name))
    torch.testing.assert_close(predictive.score(), predictive.ood_score)
    trace = torch.einsum("ncc->n", predictive.covariance)
    torch.testing.assert_close(predictive.score("variance"), trace)
    largest = predictive.probs.max(-1).values
    torch.testing.assert_close(predictive.score("max_prob"), 1 - largest)
    with pytest.raises(InvalidValue, match="score"):
        predictive.score("entropie")


def test_doubt_of_single_logits_and_of_values():
    la, case = dense.fit("mlp-binary")
    predictive = la.predict(case.x, link_approx="probit")
    p = predictive.probs.reshape(len(case.x), -1)
    torch.testing.assert_close(predictive.score("max_prob"), torch.minimum(p, 1 - p).sum(1))
    la, case = dense.fit("mlp-regression")
    with pytest.raises(InvalidValue, match="probabilities"):
        la.predict(case.x).score("max_prob")


def test_tokens_by_position():
    la, case = dense.fit("tokens", prior_precision=3.0)
    predictive = la.predict(case.x, link_approx="mc", n_samples=4000)
    p = drawn_outputs(la, case.x, 20_000).softmax(-1)  # (s, n, t, c)
    entropy = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    found = predictive.by_position()
    assert found.entropy.shape == case.y.shape
    close(found.entropy, entropy, 4000)
    close(found.aleatoric, aleatoric, 4000)
    close(found.epistemic, entropy - aleatoric, 4000)
    for name in ("entropy", "epistemic", "aleatoric"):
        by_example = getattr(predictive, name)
        torch.testing.assert_close(getattr(found, name).sum(1), by_example)


@pytest.mark.parametrize("link", ["probit", "centred", "mc"])
def test_ignored_positions_have_no_entropy_and_no_log_prob(link):
    la, case = dense.fit("tokens")
    labels = case.y.clone()
    labels[:, -1] = -100
    labels[2] = -100
    counted = labels != -100
    predictive = la.predict(case.x, link_approx=link)
    p = predictive.probs
    log_prob = predictive.log_prob(labels)
    want = p.gather(-1, case.y[..., None])[..., 0].log() * counted
    torch.testing.assert_close(log_prob, want)
    entropy = torch.special.entr(p).sum(-1)
    for given in (labels, counted):
        found = predictive.by_position(given)
        torch.testing.assert_close(found.entropy, entropy * counted)
        assert (found.epistemic[~counted] == 0).all()
        assert (found.aleatoric[~counted] == 0).all()


def test_classes_on_the_second_axis():
    torch.manual_seed(2)
    x, y = torch.randn(5, 2, 4, 6).double(), torch.randint(0, 3, (5, 4, 6))
    model = nn.Conv2d(2, 3, 1).double()
    la = Laplace(model, "classification").fit([(x, y)])
    predictive = la.predict(x, link_approx="probit")
    p = predictive.probs  # (n, c, h, w)
    found = predictive.by_position(y)
    torch.testing.assert_close(found.entropy, torch.special.entr(p).sum(1))
    torch.testing.assert_close(predictive.log_prob(y), p.gather(1, y[:, None])[:, 0].log())
    assert predictive.variances.total.shape == p.shape


def test_densities_of_values_and_counts():
    la, case = dense.fit("mlp-regression", sigma_noise=0.6)
    predictive = la.predict(case.x)
    want = predictive.distribution().log_prob(case.y)
    torch.testing.assert_close(predictive.log_prob(case.y), want)
    entropy = predictive.distribution().entropy()
    torch.testing.assert_close(predictive.by_position().entropy, entropy)


def test_wrong_masks():
    la, case = dense.fit("tokens")
    predictive = la.predict(case.x)
    with pytest.raises(InvalidValue, match="each position"):
        predictive.by_position(case.y[:, :-1])
    with pytest.raises(InvalidType, match="mask"):
        predictive.by_position(case.y.double())
    la, case = dense.fit("mlp-regression")
    with pytest.raises(InvalidValue, match="ignores no label"):
        la.predict(case.x).by_position(torch.zeros(len(case.x), dtype=torch.long))
