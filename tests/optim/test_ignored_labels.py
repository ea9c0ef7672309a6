"""Labels that the loss ignores: their positions are in no factor, as in the library's own pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from optim.captured import assert_same_factors, capture, factors, reference
from torch import nn

N, LENGTH, CLASSES = 6, 7, 4


class Mixing(nn.Module):
    """Tokens look back, as in a language model: rows of ignored positions may still be read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.second(self.first(x).cumsum(1).tanh())


class Padded(Mixing):
    """The last position is read by nothing."""

    def forward(self, x):
        return super().forward(x)[:, :-1]


class ClassesFirst(Mixing):
    """Scores with the classes on axis 1."""

    def forward(self, x):
        return super().forward(x).mT


MODELS = {
    "by itself": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)),
    "rectified": lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, CLASSES)),
    "mixing": Mixing,
    "padded": Padded,
}


def network(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def batch(model, ignored, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, LENGTH, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(0, CLASSES, (N, model(x).shape[1]), generator=generator)
    if ignored:
        y[0, 2:] = y[1, :3] = y[4] = -100
    return x, y


LOSSES = {
    "flat": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum"),
    "turned": lambda f, y: F.cross_entropy(f.mT, y, reduction="sum"),
}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_listening_leaves_out_what_the_loss_ignores(name, ignored, loss, kfac_approx, caplog):
    """ "rectified" has positions of which no unit is on: they count without a gradient."""
    model = network(name)
    found = capture(model, "classification", "empirical", kfac_approx=kfac_approx)
    for seed in (1, 2):  # the first batch teaches, the second does not
        x, y = batch(model.eval(), ignored, seed)
        model.train()
        (LOSSES[loss](model(x), y) / N).backward()
        got = factors(found.take())
        options = {"fisher": "empirical", "kfac_approx": kfac_approx}
        want = reference(model, "classification", (x, y), **options)
        assert_same_factors(got, factors(want.blocks))
    assert not caplog.records


def test_classes_on_axis_one():
    torch.manual_seed(0)
    model = ClassesFirst().double()
    x, y = batch(Mixing().double(), True)
    found = capture(model, "classification", "empirical", class_axis=1)
    (F.cross_entropy(model(x), y, reduction="sum") / N).backward()
    want = reference(model.eval(), "classification", (x, y), fisher="empirical", class_axis=1)
    assert_same_factors(factors(found.take()), factors(want.blocks))


def test_gradients_stay_the_losses_own():
    """The pass within the caller's backward pass adds to no gradient."""
    plain, model = network("mixing"), network("mixing")
    x, y = batch(plain, True)
    found = capture(model, "classification", "empirical")
    for one in (plain, model):
        F.cross_entropy(one(x).mT, y).backward()
    assert found.take()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
