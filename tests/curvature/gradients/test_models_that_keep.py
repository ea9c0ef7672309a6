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


def test_copies_stay_vectorised():
    """Models that keep tensors do not pay for it: each example alone would call forward again."""
    model, batches = Keeping(False).double(), data()
    Curvature(model, "classification").fit(batches[:1])
    calls = len(model.all)
    model.all.clear()
    Curvature(model, "classification").fit([(torch.cat([x for x, _ in batches]),
                                             torch.cat([y for _, y in batches]))])  # fmt: skip
    assert len(model.all) == calls  # of 9 examples as of 4


def test_hooks_of_the_callers_see_tensors():
    model, batches, seen = Keeping(False).double(), data(), {}
    model.first.register_forward_hook(lambda module, x, y: seen.__setitem__("y", y.detach()))
    Laplace(model, "classification").fit(batches)
    assert bool(torch.isfinite(seen["y"] + 0).all())


def test_blocks_are_those_of_examples_alone():
    """With a hook the copies run one after another: the same numbers."""
    batches = data()
    model = Keeping(False).double()
    together = Curvature(model, "classification").fit(batches)
    model.first.register_forward_hook(lambda *_: None)
    alone = Curvature(model, "classification").fit(batches)
    for name, block in together.blocks.items():
        torch.testing.assert_close(
            block.dense(), alone.blocks[name].dense(), rtol=1e-11, atol=1e-13
        )


def test_training_goes_on():
    marglik_training(Keeping(True).double(), data(), n_epochs=2)
