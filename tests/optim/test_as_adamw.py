"""In their own coordinates all layers are updated by AdamW, bit by bit as torch does it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_laplace.optim import KFAC, EigenAdam, Estimate

BETAS, STEPS = (0.9, 0.95), 12


class Mixed(nn.Module):
    """A table, a convolution with groups, norms, layers with and without bias, a lone scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 8, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.conv(self.table(x).mT).mT
        return self.head(self.scale * self.inner(self.norm(h)).tanh().mean(1))


def trained(optimizer_of, dtype=torch.float32, steps=STEPS):
    model = Mixed().to(dtype)
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randint(0, 7, (6, 5), generator=generator)
        y = torch.randint(0, 3, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def groups_of(model):
    slow = [p for p in model.parameters() if p.ndim < 2]
    fast = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": fast, "lr": 0.02, "weight_decay": 0.1},
        {"params": slow, "lr": 0.01, "weight_decay": 0.0},
    ]


def by_torch(model):
    return torch.optim.AdamW(groups_of(model), betas=BETAS, eps=1e-8, foreach=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigen_adam_without_bases_is_adamw_bit_by_bit(dtype):
    """A weight and its bias have one state, but learning rates and decays of their own."""
    curvature = Estimate(largest=0, every=2, bases_every=3)

    def ours(model):
        return KFAC(model, params=groups_of(model), rule=EigenAdam(BETAS), curvature=curvature)

    model, optimizer = trained(ours, dtype)
    want, _ = trained(by_torch, dtype)
    for (name, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert optimizer.coverage["inner.weight"] == "kfac"


def test_with_bases_it_is_not():
    model, _ = trained(lambda model: KFAC(model, params=groups_of(model)))
    want, _ = trained(by_torch)
    assert not torch.equal(model.inner.weight, want.inner.weight)


def test_parameters_without_factors_take_adamws_steps_beside_those_with():
    """The gradients differ after the first step, so only that one can be compared."""
    model, optimizer = trained(lambda model: KFAC(model, params=groups_of(model)), steps=1)
    want, _ = trained(by_torch, steps=1)
    alone = [name for name, kind in optimizer.coverage.items() if kind == "adamw"]
    assert alone == ["scale", "table.weight", "norm.weight", "norm.bias"]
    for name in alone:
        assert torch.equal(model.get_parameter(name), want.get_parameter(name)), name


def test_no_factors_for_groups_that_want_none():
    def ours(model):
        return KFAC(model, params=[group | {"kfac": False} for group in groups_of(model)])

    model, optimizer = trained(ours)
    want, _ = trained(by_torch)
    assert set(optimizer.coverage.values()) == {"adamw"}
    for (name, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), name


class Filtered(nn.Module):
    """A filter of complex gains over frequencies, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gains = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.gains, 4))


def steps_of(model, optimizer, count):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(x), x.argmax(1) % 3).backward()
        optimizer.step()


def test_complex_parameters_take_adamws_steps_and_resume():
    """In the first step the gradients are the same; later ones see another head."""
    model, want = Filtered(), Filtered()
    optimizer = KFAC(model, lr=0.02, weight_decay=0.1)
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": BETAS, "foreach": False}
    steps_of(model, optimizer, 1)
    steps_of(want, torch.optim.AdamW(want.parameters(), **options), 1)
    assert torch.equal(model.gains, want.gains)
    assert optimizer.coverage == {"gains": "adamw", "head.weight": "kfac", "head.bias": "kfac"}
    again = Filtered()
    again.load_state_dict(model.state_dict())
    resumed = KFAC(again, lr=0.02, weight_decay=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (again, resumed)):
        steps_of(one, its, 6)
    assert torch.equal(model.gains, again.gains) and torch.equal(
        model.head.weight, again.head.weight
    )
