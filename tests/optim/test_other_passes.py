"""Passes that differ from the first, and outputs and inputs of other forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim.captured import (
    assert_captured,
    assert_nothing_pending,
    assert_same_factors,
    backward,
    calm,
    capture,
    factors,
    small,
    wanted,
)
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.optim import KFAC


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
    model = Skipping()
    found = capture(model, "classification", "exact")
    backward(model, data)
    assert found.take().keys() == {"first.weight", "second.weight", "head.weight"}
    model.skip = True
    backward(model, data)
    sums = found.take()
    assert sums.keys() == {"first.weight", "head.weight"}
    assert_same_factors(factors(sums), wanted(model, data))


def test_a_weight_that_is_used_in_another_way_is_not_captured_then(data):
    model = Skipping()
    found = capture(model, "classification", "exact")
    backward(model, data)
    found.take()
    model.twice = True
    backward(model, data)
    assert found.take().keys() == {"first.weight", "second.weight"}


def test_a_layer_that_is_frozen_later_is_not_captured_then(data):
    model = small()
    found = capture(model, "classification", "exact")
    backward(model, data)
    found.take()
    model[0].requires_grad_(False)
    backward(model, data)
    assert found.take().keys() == {"2.weight"}


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


def test_several_outputs_are_refused_with_the_option_of_the_optimiser(data):
    optimizer = KFAC(TwoOutputs())
    with pytest.raises(InvalidType, match="or pass output_fn"):
        optimizer.model(data[0])


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
    backward(model, data)
    assert_captured(found, want)
