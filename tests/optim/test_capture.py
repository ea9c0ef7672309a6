"""What counts as a training pass, and what its sums are; what a capture leaves alone."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from optim.captured import assert_same_factors, calm, capture, factors, reference
from torch import nn
from torch.overrides import _get_current_function_mode

from kfac_laplace.errors import InvalidValue, UnsupportedUse

N = 8


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n: int = N):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


@pytest.fixture
def data():
    return batch()


def wanted(model, data, fisher="exact"):
    return factors(reference(model, "classification", data, fisher=fisher).blocks)


def assert_nothing_pending(found):
    assert _get_current_function_mode() is None
    assert found.take() == {}


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 2, 5), (1,) * 8])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_micro_batches_of_any_split_are_the_whole_batch(fisher, sizes, data):
    """The loss of each is its part of the mean over all; a batch of one teaches no row layout."""
    model = small()
    want = wanted(model, data, fisher)
    found = capture(model, "classification", fisher)
    for x, y in zip(data[0].split(sizes), data[1].split(sizes), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    sums = found.take()
    assert {n for _, n in sums.values()} == {N}
    assert_same_factors(factors(sums), want)


def test_the_scale_of_the_loss_drops_out(data):
    model = small()
    found = capture(model, "classification", "empirical")
    (1024 * F.cross_entropy(model(data[0]), data[1])).backward()
    assert_same_factors(factors(found.take(1024)), wanted(model, data, "empirical"))


def test_vectors_of_our_own_do_not_see_the_loss(data):
    model = small()
    found = capture(model, "classification", "exact")
    (1024 * F.cross_entropy(model(data[0]), data[1])).backward()
    assert_same_factors(factors(found.take()), wanted(model, data))


def test_only_training_passes_count(data):
    """Not in evaluation mode, nor without gradients, paused, of a copy, or without a loss."""
    model, (x, y) = small(), data
    found = capture(model, "classification")
    F.cross_entropy(model.eval()(x), y).backward()
    model.train()
    with torch.no_grad():
        model(x)
    with found.paused():
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(copy.deepcopy(model)(x), y).backward()
    model(x)
    assert_nothing_pending(found)
    F.cross_entropy(model(x), y).backward()
    assert found.take().keys() == {"0.weight", "2.weight"}


def test_a_pass_inside_counts_with_the_loss_of_the_outer_one(data):
    """A teacher that is the model itself, without gradients, between forward and backward."""
    model, (x, y) = small(), data
    found = capture(model, "classification", "empirical")
    output = model(x)
    with torch.no_grad():
        model(2 * x)
    F.cross_entropy(output, y).backward()
    assert_same_factors(factors(found.take()), wanted(model, data, "empirical"))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_graph_that_is_used_twice_counts_once(fisher, data):
    model, (x, y) = small(), data
    found = capture(model, "classification", fisher)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    sums = found.take()
    assert {n for _, n in sums.values()} == {N}
    assert_same_factors(factors(sums), wanted(model, data, fisher))


def test_derivatives_by_inputs_are_no_training(data):
    """A gradient penalty runs backward twice before the loss does."""
    model, (x, y) = small(), data
    x = x.clone().requires_grad_()
    found = capture(model, "classification", "exact")
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert found.take() == {}
    (F.cross_entropy(output, y) + slope.square().sum()).backward()
    sums = found.take()
    assert {n for _, n in sums.values()} == {N}
    assert_same_factors(factors(sums), wanted(model, data))


def test_listening_does_not_hear_derivatives_by_inputs(data):
    model, (x, y) = small(), data
    x = x.clone().requires_grad_()
    found = capture(model, "classification", "empirical")
    output = model(x)
    torch.autograd.grad(output.sum(), x, retain_graph=True)
    F.cross_entropy(output, y).backward()
    assert_same_factors(factors(found.take()), wanted(model, data, "empirical"))


def test_gradients_that_the_caller_stores_count(data):
    model, (x, y) = small(), data
    found = capture(model, "classification", "empirical")
    torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert_same_factors(factors(found.take()), wanted(model, data, "empirical"))


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
    F.cross_entropy(model(x), y).backward()
    assert _get_current_function_mode() is None
    assert_same_factors(factors(found.take()), want)


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
    F.cross_entropy(model(x), y).backward()
    assert_same_factors(factors(found.take()), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_batch_that_is_not_finite_is_not_taken_in(fisher, bad, data):
    model, (x, y) = small(), data
    found = capture(model, "classification", fisher)
    F.cross_entropy(model(x), y).backward()
    assert found.take()
    x = x.clone()
    x[0, 0] = bad
    F.cross_entropy(model(x), y).backward()
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
    assert_same_factors(factors(one.take()), wanted(first, data))
    assert_same_factors(factors(other.take()), wanted(second, data))


# --- the model stays the caller's --------------------------------------------------------------


def hooks(model):
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


def test_hooks_go_with_close_and_with_the_last_reference():
    model = small()
    found = capture(model, "classification")
    assert hooks(model) == 2
    found.close()
    assert hooks(model) == 0
    found = capture(model, "classification")
    del found
    gc.collect()
    assert hooks(model) == 0


def test_a_copied_or_stored_model_has_hooks_that_do_nothing(data):
    model = small()
    found = capture(model, "classification")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        F.cross_entropy(other(data[0]), data[1]).backward()
    assert_nothing_pending(found)


def noisy():
    """Batch statistics, dropout, and writing in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_the_training_pass_is_what_it_would_have_been(fisher):
    """Loss, gradients, buffers, modes and the random state, bit by bit."""
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    seen = []
    for captured in (False, True):
        model = noisy()
        found = capture(model, "classification", fisher) if captured else None
        torch.manual_seed(3)
        losses = []
        for _ in range(2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.item())
        assert all(module.training for module in model.modules())
        gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        state = model.state_dict() | gradients
        seen.append((losses, torch.get_rng_state(), state))
        if found is not None:
            assert found.take().keys() == {"0.weight", "5.weight"}
    (losses, draws, state), (others, more, its) = seen
    assert losses == others
    assert torch.equal(draws, more)
    for name, value in state.items():
        assert torch.equal(value, its[name]), name


def test_dropout_thins_the_factors():
    """They are those of the network that was run: inputs of dropped units are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 2)).double()
    x = torch.ones(1, 50, dtype=torch.float64)
    found = capture(model, "regression", "exact")
    model(x).sum().backward()
    (inputs, _) = factors(found.take())["1.weight"]
    kept = inputs[0].diagonal()[:-1]
    assert set(kept.tolist()) == {0.0, 4.0}  # (1 / (1 − p))²


# --- passes that differ from the first ---------------------------------------------------------


class Skipping(nn.Module):
    """A residual network that may leave a layer out, and may add a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (nn.Linear(3, 3).double() for _ in range(3))
        self.skip, self.twice = False, False

    def forward(self, x):
        h = self.first(x).tanh()
        if not self.skip:
            h = h + self.second(h).tanh()
        return self.head(h) @ self.head.weight if self.twice else self.head(h)


def test_a_layer_that_is_left_out_is_not_captured_then(data):
    model, (x, y) = Skipping(), data
    found = capture(model, "classification", "exact")
    F.cross_entropy(model(x), y).backward()
    assert found.take().keys() == {"first.weight", "second.weight", "head.weight"}
    model.skip = True
    F.cross_entropy(model(x), y).backward()
    sums = found.take()
    assert sums.keys() == {"first.weight", "head.weight"}
    assert_same_factors(factors(sums), wanted(model, data))


def test_a_weight_that_is_used_in_another_way_is_not_captured_then(data):
    model, (x, y) = Skipping(), data
    found = capture(model, "classification", "exact")
    F.cross_entropy(model(x), y).backward()
    found.take()
    model.twice = True
    F.cross_entropy(model(x), y).backward()
    assert found.take().keys() == {"first.weight", "second.weight"}


def test_a_layer_that_is_frozen_later_is_not_captured_then(data):
    model, (x, y) = small(), data
    found = capture(model, "classification", "exact")
    F.cross_entropy(model(x), y).backward()
    found.take()
    model[0].requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    assert found.take().keys() == {"2.weight"}


# --- outputs and inputs of other forms ---------------------------------------------------------


class Tagger(nn.Module):
    """Scores (n, t, c), or (n, c, t) as torch's losses want them."""

    def __init__(self, classes_last: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.classes_last = nn.Linear(3, 4).double(), classes_last

    def forward(self, x):
        return self.layer(x) if self.classes_last else self.layer(x).mT


@pytest.mark.parametrize("classes_last", [True, False])
def test_a_loss_with_its_classes_on_another_axis_is_refused(classes_last):
    model = Tagger(classes_last)
    x, y = torch.randn(5, 6, 3).double(), torch.randint(0, 4, (5, 6))
    found = capture(model, "classification", "exact", class_axis=1 if classes_last else None)
    output = model(x)
    output = output.mT if classes_last else output
    with pytest.raises(InvalidValue, match="class_axis"):
        F.cross_entropy(output, y).backward()
    assert_nothing_pending(found)
    right = capture(model, "classification", "exact", class_axis=2 if classes_last else 1)
    output = model(x)
    F.cross_entropy(output.mT if classes_last else output, y).backward()
    assert right.take()


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head, self.other = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x, *, scale=1.0):
        h = self.trunk(scale * x).tanh()
        return self.head(h), self.other(h)


def test_one_of_several_outputs_is_picked_by_a_function(data):
    model, (x, y) = TwoOutputs(), data
    found = capture(model, "classification", "exact", output_fn=lambda outputs: outputs[0])
    output, other = model(x, scale=2.0)
    (F.cross_entropy(output, y) + other.sum()).backward()
    sums = found.take()
    assert sums.keys() == {"trunk.weight", "head.weight"}
    plain = nn.Sequential(model.trunk, nn.Tanh(), model.head)
    want = wanted(plain, (2 * x, y))
    got = dict(zip(("0.weight", "2.weight"), factors(sums).values(), strict=True))
    assert_same_factors(got, want)


def test_reentrant_checkpoints_are_refused(data):
    model = nn.Sequential(Checkpointed(True), nn.Linear(3, 3).double())
    capture_ = capture(model, "classification")
    with pytest.raises(UnsupportedUse, match="re-entrant"):
        model(data[0].clone().requires_grad_())
    assert_nothing_pending(capture_)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(3, 3).double(), reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_other_checkpoints_are_not(fisher, data):
    torch.manual_seed(0)
    model = nn.Sequential(Checkpointed(False), nn.Tanh(), nn.Linear(3, 3).double())
    want = wanted(model, data, fisher)
    found = capture(calm(model), "classification", fisher)
    F.cross_entropy(model(data[0]), data[1]).backward()
    assert_same_factors(factors(found.take()), want)
