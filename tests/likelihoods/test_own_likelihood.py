"""A likelihood of the user's own: what needs class probabilities refuses, the rest works."""

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace, Likelihood
from kfac_laplace.errors import UnsupportedUse


class Poisson(Likelihood):
    """Counts with log rate f."""

    def class_axis(self, output, target):
        return -1

    def align_target(self, target, f):
        return target.to(f.dtype).reshape(f.shape)

    def log_prob(self, f, y, sigma):
        return (y * f - f.exp() - torch.lgamma(y + 1)).flatten(1).sum(1)

    def statistic(self, f, y):
        return self.log_prob(f.double(), y.double(), torch.ones(())).sum()

    def log_likelihood(self, statistic, count, sigma):
        return statistic

    def score(self, f, y):
        return f.exp() - y

    def roots(self, f):
        yield (f / 2).exp()

    def sample(self, f, generator):
        return torch.poisson(f.exp(), generator=generator)

    def hessian(self, f):
        return torch.diag_embed(f.exp())


@pytest.fixture
def fitted():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64, generator=draw)
    y = torch.poisson(x.sum(1, keepdim=True).exp(), generator=draw)
    torch.manual_seed(0)
    return Laplace(nn.Linear(2, 1).double(), Poisson()).fit([(x, y)]), x, y


def test_evidence_and_functions_need_no_classes(fitted):
    la, x, _ = fitted
    before = float(la.log_marginal_likelihood())
    assert float(la.optimize_prior().log_marginal_likelihood()) >= before
    assert la.functional_samples(x, 3).shape == (3, 40, 1)
    predictive = la.predict(x)
    assert predictive.mean_f.shape == (40, 1, 1) and (predictive.covariance > 0).all()


@pytest.mark.parametrize(
    "ask",
    [
        lambda la, x: la(x),
        lambda la, x: la.predict(x).mean,
        lambda la, x: la.predict(x).epistemic,
        lambda la, x: la.predictive_samples(x, 2),
        lambda la, x: la.calibrate(),
    ],
    ids="call mean epistemic samples calibrate".split(),
)
def test_what_needs_class_probabilities_refuses(fitted, ask):
    """A softmax over whatever comes would be a silent wrong answer."""
    la, x, _ = fitted
    with pytest.raises(UnsupportedUse, match="Poisson"):
        ask(la, x)
