"""A softmax or sigmoid inside the model is said once a fit; logits never raise the suspicion."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent

from kfac_laplace import Bernoulli, Laplace, MarglikTuner, marglik_training
from kfac_laplace.likelihoods.activations import sigmoid_values

SAYS = "taken for logits"


class Net(nn.Module):
    """Two layers and what comes after."""

    def __init__(self, end: Callable[[Tensor], Tensor], outputs: int = 3, positions: bool = False):
        super().__init__()
        self.first, self.last, self.end = nn.Linear(4, 6), nn.Linear(6, outputs), end
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.first(x).tanh()))


def class_axis_one(f: Tensor) -> Tensor:
    """Outputs (n, c, t)."""
    return f.softmax(-1).mT


#: Likelihood, what the model ends with, outputs, and the activation that is named; "" for none.
ENDS: dict[str, tuple[str, Callable, int, str]] = {
    "softmax": ("classification", lambda f: f.softmax(-1), 3, "softmax"),
    "softmax of two": ("classification", lambda f: f.softmax(-1), 2, "softmax"),
    "normalised": ("classification", lambda f: f.exp() / f.exp().sum(-1, True), 3, "softmax"),
    "exp of log-softmax": ("classification", lambda f: f.log_softmax(-1).exp(), 3, "softmax"),
    "sigmoid and its rest": (
        "classification",
        lambda f: torch.stack([f[:, 0].sigmoid(), (-f[:, 0]).sigmoid()], -1),
        3,
        "sigmoid",
    ),
    "sigmoid of classes": ("classification", torch.sigmoid, 3, "sigmoid"),
    "sigmoid": ("binary", torch.sigmoid, 1, "sigmoid"),
    "several sigmoids": ("binary", torch.sigmoid, 3, "sigmoid"),
    "squeezed sigmoid": ("binary", lambda f: f.sigmoid().squeeze(-1), 1, "sigmoid"),
    "clamped sigmoid": ("binary", lambda f: f.sigmoid().clamp(1e-6, 1 - 1e-6), 1, "sigmoid"),
    "log-sigmoid": ("binary", F.logsigmoid, 1, "log-sigmoid"),
    "one of two": ("binary", lambda f: f.softmax(-1)[:, 1], 2, "softmax"),
    "sigmoid by hand": ("binary", lambda f: 1 / (1 + (-40 * f).exp()), 3, "sigmoid"),
    "logits": ("classification", lambda f: f, 3, ""),
    "log-softmax": ("classification", lambda f: f.log_softmax(-1), 3, ""),
    "log of a softmax": ("classification", lambda f: f.softmax(-1).log(), 3, ""),
    "bounded logits": ("classification", lambda f: 5 * f.sigmoid(), 3, ""),
    "rectified": ("classification", F.relu, 3, ""),
    "zeros": ("classification", lambda f: 0 * f, 3, ""),
    "one logit": ("binary", lambda f: f, 1, ""),
    "small logits": ("binary", lambda f: 0.05 * f.tanh() + 0.1, 1, ""),
    "logits near one": ("binary", lambda f: 0.4 * f.tanh() + 0.5, 1, ""),
    "values": ("regression", torch.sigmoid, 3, ""),
    "shares": ("regression", lambda f: f.softmax(-1), 3, ""),
}
ends = pytest.mark.parametrize("name", ENDS)


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, str, tuple]:
    likelihood, end, outputs, _ = ENDS[name]
    torch.manual_seed(0)
    model, x = Net(end, outputs).to(dtype), torch.randn(40, 4).to(dtype)
    f = model(x)
    if likelihood == "classification":
        y = torch.randint(0, f.shape[-1], (40,))
    else:
        y = torch.randint(0, 2, f.shape).to(dtype)
    return model, likelihood, (x, y)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if SAYS in r.getMessage()]


def assert_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    activation, messages = ENDS[name][3], said(caplog)
    assert len(messages) == bool(activation)
    assert all(f"without the {activation}" in message for message in messages)


@ends
def test_once_a_fit(name, caplog):
    model, likelihood, batch = made(name)
    la = Laplace(model, likelihood)
    for _ in range(2):
        caplog.clear()
        la.fit([batch, batch])
        assert_said(name, caplog)
    caplog.clear()
    la.fit([batch], override=False).calibrate()
    la(batch[0])
    assert not said(caplog)


@ends
def test_once_in_the_loss_of_a_tuner(name, caplog):
    model, likelihood, (x, y) = made(name)
    tuner = MarglikTuner(model, likelihood, n_data=40)
    for _ in range(2):
        tuner.loss(model(x), y)
    tuner.step([(x, y)])
    tuner.laplace([(x, y)])
    assert_said(name, caplog)
    assert all(record.levelno == logging.WARNING for record in caplog.records if SAYS in record.msg)


@ends
def test_once_in_training(name, caplog):
    model, likelihood, batch = made(name)
    marglik_training(model, [batch], likelihood, n_epochs=2)
    assert_said(name, caplog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "logits", "log-softmax", "one logit"])
def test_in_every_precision(name, dtype, caplog):
    model, likelihood, batch = made(name, dtype)
    Laplace(model, likelihood).fit([batch])
    assert_said(name, caplog)


@pytest.mark.parametrize("end", [class_axis_one, lambda f: f.mT])
def test_classes_on_the_second_axis(end, caplog):
    torch.manual_seed(0)
    model, x = Net(end).double(), torch.randn(5, 7, 4).double()
    Laplace(model).fit([(x, torch.randint(0, 3, (5, 7)))])
    assert len(said(caplog)) == (end is class_axis_one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_example_is_enough_for_a_softmax(dtype, caplog):
    model, likelihood, (x, y) = made("softmax", dtype)
    Laplace(model, likelihood).fit([(x[:1], y[:1])])
    assert_said("softmax", caplog)


def test_logits_of_any_spread_are_no_sigmoids():
    """Gaussian and uniform values around one half, of which hundreds of draws are looked at."""
    draw = torch.Generator().manual_seed(0)
    for spread in (0.01, 0.1, 0.2, 0.25, 0.3, 0.4, 1.0):
        for _ in range(200):
            values = 0.5 + spread * torch.randn(64, 1, generator=draw)
            assert not sigmoid_values(values)
    steep = (8 * torch.randn(200, 64, generator=draw)).sigmoid()
    assert all(sigmoid_values(values[:, None]) for values in steep)


class OfProbabilities(Bernoulli):
    """Outputs are probabilities, and no logits."""

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        return Independent(BernoulliDistribution(probs=f), 1)


def test_a_likelihood_may_take_probabilities(caplog):
    """What outputs mean is for the likelihood to say."""
    f = torch.rand(40, 3, requires_grad=True).sigmoid()
    assert Bernoulli().activation(f) == "sigmoid" and OfProbabilities().activation(f) == ""
