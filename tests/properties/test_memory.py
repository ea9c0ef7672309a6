"""Memory does not grow with rounds, and nothing of ours keeps what its owner has let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.optim import KFAC


def network() -> nn.Module:
    """A convolution, a norm and a layer."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.LayerNorm(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def data() -> list[tuple[Tensor, Tensor]]:
    """Two batches."""
    return [(torch.randn(8, 2, 6), torch.randint(0, 3, (8,))) for _ in range(2)]


def fits() -> Callable[[], object]:
    """A posterior that is fitted anew, optimised and asked."""
    model, batches = network(), data()
    la = Laplace(model)

    def once() -> None:
        la.fit(batches).optimize_prior(n_steps=3)
        la.predict(batches[0][0], link_approx="mc", n_samples=3)
        la.sample(2)

    return once


def posteriors() -> Callable[[], object]:
    """Another posterior each time, of the same model."""
    model, batches = network(), data()
    return lambda: Laplace(model, hessian_structure="ekfac").fit(batches)(batches[0][0])


def rounds() -> Callable[[], object]:
    """Rounds of a tuner, but for its history, which grows by what a round found."""
    model, batches = network(), data()
    tuner = MarglikTuner(model, "classification", 16, n_epochs_burnin=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def once() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        tuner.step(batches)
        del tuner.history[:-1]

    return once


def steps() -> Callable[[], object]:
    """Steps of K-FAC."""
    model, batches = network(), data()
    optimizer = KFAC(model)

    def once() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return once


def held() -> tuple[int, int]:
    """How many tensors there are, and how many numbers in them."""
    gc.collect()
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    return len(found), sum(one.numel() for one in found)


KINDS = [fits, posteriors, rounds, steps]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@by_kind
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_rounds(kind, count):
    once = kind()
    for _ in range(12):
        once()
    before = held()
    for _ in range(count):
        once()
    assert held() == before


@by_kind
def test_what_is_let_go_is_gone(kind, monkeypatch):
    seen: list[weakref.ref[nn.Module]] = []
    made = network

    def watched() -> nn.Module:
        model = made()
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setitem(kind.__globals__, "network", watched)
    once = kind()
    once()
    del once
    gc.collect()
    (model,) = seen
    assert model() is None
