"""What counts as a training pass, and what its sums are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optim.captured import (
    N,
    assert_captured,
    assert_nothing_pending,
    backward,
    capture,
    small,
    wanted,
)
from torch import nn
from torch.overrides import _get_current_function_mode


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 2, 5), (1,) * 8])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_micro_batches_of_any_split_are_the_whole_batch(fisher, sizes, data):
    """The loss of each is its part of the mean over all; a batch of one teaches no row layout."""
    model = small()
    want = wanted(model, data, fisher)
    found = capture(model, "classification", fisher)
    for x, y in zip(data[0].split(sizes), data[1].split(sizes), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    assert_captured(found, want)


def test_the_scale_of_the_loss_drops_out(data):
    model = small()
    found = capture(model, "classification", "empirical")
    (1024 * F.cross_entropy(model(data[0]), data[1])).backward()
    assert_captured(found, wanted(model, data, "empirical"), 1024)


def test_vectors_of_our_own_do_not_see_the_loss(data):
    model = small()
    found = capture(model, "classification", "exact")
    (1024 * F.cross_entropy(model(data[0]), data[1])).backward()
    assert_captured(found, wanted(model, data))


def test_only_training_passes_count(data):
    """Not in evaluation mode, nor without gradients, paused, of a copy, or without a loss."""
    model, (x, y) = small(), data
    found = capture(model, "classification")
    F.cross_entropy(model.eval()(x), y).backward()
    model.train()
    with torch.no_grad():
        model(x)
    with found.paused():
        backward(model, (x, y))
    F.cross_entropy(copy.deepcopy(model)(x), y).backward()
    model(x)
    assert_nothing_pending(found)
    backward(model, (x, y))
    assert found.take().keys() == {"0.weight", "2.weight"}


def test_a_pass_inside_counts_with_the_loss_of_the_outer_one(data):
    """A teacher that is the model itself, without gradients, between forward and backward."""
    model, (x, y) = small(), data
    found = capture(model, "classification", "empirical")
    output = model(x)
    with torch.no_grad():
        model(2 * x)
    F.cross_entropy(output, y).backward()
    assert_captured(found, wanted(model, data, "empirical"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_graph_that_is_used_twice_counts_once(fisher, data):
    model, (x, y) = small(), data
    found = capture(model, "classification", fisher)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_captured(found, wanted(model, data, fisher))


def test_derivatives_by_inputs_are_no_training(data):
    """A gradient penalty runs backward twice before the loss does."""
    model, (x, y) = small(), data
    x = x.clone().requires_grad_()
    found = capture(model, "classification", "exact")
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert found.take() == {}
    (F.cross_entropy(output, y) + slope.square().sum()).backward()
    assert_captured(found, wanted(model, data))


def test_listening_does_not_hear_derivatives_by_inputs(data):
    model, (x, y) = small(), data
    x = x.clone().requires_grad_()
    found = capture(model, "classification", "empirical")
    output = model(x)
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    F.cross_entropy(output, y).backward()
    assert_captured(found, wanted(model, data, "empirical"))


def test_gradients_that_the_caller_stores_count(data):
    model, (x, y) = small(), data
    found = capture(model, "classification", "empirical")
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert_captured(found, wanted(model, data, "empirical"))


class Fails(nn.Module):
    """Raises in the forward or the backward pass while told to."""

    def __init__(self):
        super().__init__()
        self.inner, self.forward_error, self.backward_error = small(), None, None

    def forward(self, x):
        h = self.inner[0](x)
        if self.forward_error is not None:
            raise self.forward_error
        if self.backward_error is not None:
            error = self.backward_error

            def fail(gradient):
                raise error

            h.register_hook(fail)
        return self.inner[1:](h)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_exception_in_the_forward_pass_leaves_nothing(fisher, error, data):
    model, (x, y) = Fails(), data
    want = wanted(model, data, fisher)
    found = capture(model, "classification", fisher)
    model(x)  # the groups are known
    model.forward_error = error
    with pytest.raises(type(error)):
        model(x)
    model.forward_error = None
    backward(model, (x, y))
    assert _get_current_function_mode() is None
    assert_captured(found, want)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_exception_in_the_backward_pass_leaves_nothing(fisher, data):
    model, (x, y) = Fails(), data
    want = wanted(model, data, fisher)
    found = capture(model, "classification", fisher)
    model(x)  # the groups are known
    model.backward_error = ValueError("no")
    if fisher == "empirical":  # our own backward pass would meet the error in the forward pass
        loss = F.cross_entropy(model(x), y)
        with pytest.raises(ValueError, match="no"):
            loss.backward()
    else:
        with pytest.raises(ValueError, match="no"):
            model(x)
    assert_nothing_pending(found)
    model.backward_error = None
    backward(model, (x, y))
    assert_captured(found, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_batch_that_is_not_finite_is_not_taken_in(fisher, bad, data):
    model, (x, y) = small(), data
    found = capture(model, "classification", fisher)
    backward(model, (x, y))
    assert found.take()
    x = x.clone()
    x[0, 0] = bad
    backward(model, (x, y))
    assert_nothing_pending(found)


def test_a_loss_that_is_not_finite_is_not_taken_in(data):
    model, (x, y) = small(), data
    found = capture(model, "classification", "empirical")
    (torch.inf * F.cross_entropy(model(x), y)).backward()
    assert_nothing_pending(found)


def test_two_models_are_told_apart(data):
    first, second = small(0), small(1)
    one = capture(first, "classification", "exact")
    other = capture(second, "classification", "exact")
    (x, y) = data
    (F.cross_entropy(first(x), y) + F.cross_entropy(second(x), y)).backward()
    assert_captured(one, wanted(first, data))
    assert_captured(other, wanted(second, data))
