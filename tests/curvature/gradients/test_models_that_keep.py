"""Models that keep what they compute: copies by example leave nothing dead in them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, marglik_training


class Keeping(nn.Module):
    """A parameter without a rule, and a forward pass that keeps tensors in several places."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.mixing = nn.Parameter(0.3 * torch.randn(5, 5))
        self.register_buffer("average", torch.zeros(1))
        self.reads, self.map, self.all, self.named = reads, None, [], {}

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).tanh()
        z = torch.einsum("bi,ij,bj->bi", z, self.mixing, z) + self.mixing.exp().sum(0)
        self.map = z.detach()
        self.all.append(z.detach())
        self.named["z"] = z.detach()
        kept = z.detach().mean()
        self.average = 0.9 * self.average + 0.1 * kept if self.reads else kept.reshape(1)
        return self.head(z)


def data() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    return [(x[:4], y[:4]), (x[4:], y[4:])]


@pytest.mark.parametrize("reads", [False, True])
def test_what_a_model_keeps_can_be_used_after_a_fit(reads):
    model, batches = Keeping(reads).double(), data()
    la = Laplace(model, "classification").fit(batches)
    assert la.coverage["mixing"] == "diag"
    for kept in (model.map, model.average, model.named["z"], *model.all):
        assert bool(torch.isfinite(kept + 0).all())
    copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    torch.save(model.state_dict(), io.BytesIO())
    assert bool(torch.isfinite(la(batches[0][0])).all())


def test_hooks_of_the_callers_see_tensors():
    model, batches, seen = Keeping(False).double(), data(), {}
    model.first.register_forward_hook(lambda module, x, y: seen.__setitem__("y", y.detach()))
    Laplace(model, "classification").fit(batches)
    assert bool(torch.isfinite(seen["y"] + 0).all())


class Branching(Keeping):
    """Gradients that a forward pass changes: by a hook of a module or tensor, or by a branch."""

    def __init__(self, how: str) -> None:
        super().__init__(False)
        self.how, self.tanh = how, nn.Tanh()
        if how == "module hook":
            self.tanh.register_full_backward_hook(lambda module, i, o: (10 * i[0],))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x) + self.mixing.exp().sum(0)
        if self.how == "tensor hook" and z.requires_grad:
            z.register_hook(lambda gradient: 10 * gradient)
        if self.how == "branch":
            z = z + (9 * (z - z.detach()) if z.requires_grad else 0)
        return self.head(self.tanh(z))


@pytest.mark.parametrize("how", ["module hook", "tensor hook", "branch"])
def test_gradients_are_those_that_the_model_really_has(how):
    """Ten times as large as those of the values, in every example of its own."""
    batches = data()
    model = Branching(how).double()
    changed = Curvature(model, "classification", hessian_structure="diag").fit(batches)
    plain = Branching("").double()
    plain.load_state_dict(model.state_dict())
    values = Curvature(plain, "classification", hessian_structure="diag").fit(batches)
    torch.testing.assert_close(
        changed.blocks["mixing"].dense(), 100 * values.blocks["mixing"].dense()
    )


def test_training_goes_on():
    marglik_training(Keeping(True).double(), data(), n_epochs=2)
