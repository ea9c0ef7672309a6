"""An optimiser that decays weights beside their prior is seen in any loop, and said once."""

import gc
import logging

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from kfac_laplace import MarglikTuner
from kfac_laplace.marglik.decay import LOOKS

SAID = "beside the prior"


def steps(optimizer, tuner, x, y, n=2):
    for _ in range(n):
        optimizer.zero_grad()
        tuner.loss(tuner.model(x), y).backward()
        optimizer.step()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 2
    return model, x, y


@pytest.mark.parametrize(
    ("kind", "options", "warned"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"weight_decay": 0}, False),
        (torch.optim.Adam, {}, False),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1e-3}, True),
    ],
)
def test_weight_decay_is_said_once(kind, options, warned, problem, caplog):
    model, x, y = problem
    tuner = MarglikTuner(model, "classification", 8)
    optimizer = kind(model.parameters(), **options)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        steps(optimizer, tuner, x, y)
        tuner.step([(x, y)])
        steps(optimizer, tuner, x, y)
    said = [record.getMessage() for record in caplog.records if SAID in record.getMessage()]
    assert len(said) == warned
    assert all(kind.__name__ in message and "weight_decay=0" in message for message in said)


@pytest.mark.parametrize("decay", [None, (0.1, 0.2), "cosine"])
def test_optimisers_that_mean_something_else_by_the_word_step(decay, problem, caplog):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model, x, y = problem
    optimizer = Own(model.parameters())
    optimizer.param_groups[0]["weight_decay"] = decay
    steps(optimizer, MarglikTuner(model, "classification", 8), x, y)
    assert SAID not in caplog.text


def test_parameters_without_a_prior_may_decay(problem, caplog):
    model, x, y = problem
    tuner = MarglikTuner(model, "classification", 8, subset_of_weights=["2.*"])
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "weight_decay": 0},
    ]
    steps(torch.optim.AdamW(groups), tuner, x, y)
    assert SAID not in caplog.text


def test_optimisers_of_other_networks_are_none_of_its_business(problem, caplog):
    model, x, y = problem
    tuner, other = MarglikTuner(model, "classification", 8), nn.Linear(2, 2)
    tuner.loss(model(x), y).backward()
    other(torch.ones(2)).sum().backward()
    torch.optim.AdamW(other.parameters()).step()
    assert SAID not in caplog.text


def test_nothing_looks_after_an_epoch_or_without_the_network(problem):
    model, x, y = problem
    gc.collect()
    before = len(LOOKS)
    tuner = MarglikTuner(model, "classification", 8)
    tuner.loss(model(x), y)
    assert len(LOOKS) == before + 1
    tuner.step([(x, y)])
    tuner.loss(model(x), y)
    assert len(LOOKS) == before
    forgotten = MarglikTuner(nn.Linear(3, 2).double(), "classification", 8)
    forgotten.loss(forgotten.model(x), y)
    assert len(LOOKS) == before + 1
    del forgotten
    gc.collect()
    assert len(LOOKS) == before


def test_hooks_of_torch_do_not_change_while_other_threads_step(problem):
    """Torch goes through them at each step, and fails where they change meanwhile."""
    model, x, y = problem
    MarglikTuner(model, "classification", 8).loss(model(x), y)
    before = [*_global_optimizer_pre_hooks]
    tuner = MarglikTuner(nn.Linear(3, 2).double(), "classification", 8)
    tuner.loss(tuner.model(x), y)
    tuner.step([(x, y)])
    assert [*_global_optimizer_pre_hooks] == before


def test_the_two_parts_of_the_loss_are_its_gradient(problem):
    """By autograd of the whole loss, under precisions by pattern and a mean."""
    model, x, y = problem
    options = {"prior_precision": {"0.*": 3.0, "2.*": 0.5}, "prior_mean": 0.1, "temperature": 0.7}
    tuner = MarglikTuner(model, "classification", 8, **options)
    tuner.prepare([(x, y)])
    whole = torch.autograd.grad(tuner.loss(model(x), y), [*model.parameters()])
    data = torch.autograd.grad(tuner.data_loss(model(x), y), [*model.parameters()])
    prior = tuner.prior_gradient()
    for p, both, one in zip(model.parameters(), whole, data, strict=True):
        torch.testing.assert_close(one + prior[p], both, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(prior[model[2].bias], 0.5 * (model[2].bias - 0.1).detach() / 8)
