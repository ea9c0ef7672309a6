"""Hooks that add the prior's gradient, in a plain loop: by `MarglikTuner.loss` on a copy."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_laplace import MarglikTuner
from kfac_laplace.errors import UnsupportedUse
from kfac_laplace.integrations.prior_gradients import PriorGradients

N, DELTA = 12, 40.0


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, torch.randn(N, 3).double(), torch.randn(N, 1).double()


def added(model, y, likelihood="regression"):
    tuner = MarglikTuner(model, likelihood, N, prior_precision=DELTA)
    return PriorGradients(tuner, lambda args, kwargs: y)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.to_dense() for p in model.parameters()]


def by_the_loss(model, x, y, likelihood="regression"):
    """Of MarglikTuner.loss, on a copy without hooks."""
    tuner = MarglikTuner(model, likelihood, N, prior_precision=DELTA)
    return gradients(model, tuner.loss(model(x), y))


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_hooks_that_a_broken_training_left_are_not_counted_beside_new_ones(problem):
    """As after an interrupted cell of a notebook, with the callback made anew."""
    model, x, y = problem
    wanted = by_the_loss(copy.deepcopy(model), x, y)
    added(model, y)
    model(x)  # and here it broke
    prior = added(model, y)
    assert_same(gradients(model, (model(x) - y).square().sum() / (2 * N)), wanted)
    prior.check_first()
    prior.close()
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(p._backward_hooks for p in model.parameters())


def test_two_at_once_are_refused(problem):
    model, x, y = problem
    first, second = added(model, y), added(model, y)
    gradients(model, (model(x) - y).square().sum())
    second.check_first()
    with pytest.raises(UnsupportedUse, match="another callback tunes the same model"):
        first.check_first()


@pytest.mark.parametrize("kept", ["copied", "saved"])
def test_copies_of_a_network_in_training_are_networks_of_their_own(problem, kept):
    """As for averages of weights, and the best ones so far."""
    model, x, y = problem
    prior = added(model, y)
    gradients(model, (model(x) - y).square().sum())
    if kept == "copied":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    few = x[:2]
    plain = gradients(other, other(few).square().sum())
    prior.close()
    assert_same(plain, gradients(model, model(few).square().sum()))


def test_a_first_batch_without_residuals_adds_nothing(problem):
    """Its gradient is zero in whatever units, which the next batch tells."""
    model, x, y = problem
    wanted = by_the_loss(copy.deepcopy(model), x, y)
    fitted = model(x).detach()
    targets = iter([fitted, y])
    tuner = MarglikTuner(model, "regression", N, prior_precision=DELTA)
    prior = PriorGradients(tuner, lambda args, kwargs: next(targets))
    found = gradients(model, (model(x) - fitted).square().sum() / (2 * N))
    assert all(torch.equal(one, torch.zeros_like(one)) for one in found)
    prior.check_first()
    assert_same(gradients(model, (model(x) - y).square().sum() / (2 * N)), wanted)


def test_sparse_gradients_stay_sparse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)).double()
    x, y = torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 2, 1])
    wanted = by_the_loss(copy.deepcopy(model), x, y, "classification")
    added(model, y, "classification")
    assert_same(gradients(model, F.cross_entropy(model(x), y)), wanted)
    assert model[0].weight.grad.is_sparse
