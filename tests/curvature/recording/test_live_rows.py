"""Rows that happen to receive no gradient: behind a rectifier that is off, or beside a maximum."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from laws import assert_dense_structures_are_exact, assert_kfac_block, fitted, seeded_case
from torch import Tensor, nn

CLASSES = 3
settings = pytest.mark.parametrize("setting", ["expand", "reduce"])

RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu-inplace": lambda z: F.relu(1 * z, inplace=True),
    "squared relu": lambda z: F.relu(z).square(),
    "cubed relu": lambda z: F.relu(z) ** 3,
    "maximum": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "minimum": lambda z: -torch.minimum(-z, torch.zeros_like(z)),
    "relu6": F.relu6,
    "hardtanh": lambda z: F.hardtanh(z, 0.0, 0.5),
    "clamp": lambda z: z.clamp(0.0, 0.5),
    "clamp-below": lambda z: z.clamp(min=0.0),
    "threshold": lambda z: F.threshold(z, 0.1, 0.0),
    "hardsigmoid": lambda z: F.hardsigmoid(3 * z),
    "hardswish": lambda z: F.hardswish(3 * z),
    "softshrink": lambda z: F.softshrink(z, 1.0),
    "hardshrink": lambda z: F.hardshrink(z, 1.0),
}


class Rectified(nn.Module):
    """linear -> linear -> rectifier -> mean -> head on rows (n, t, i)."""

    def __init__(self, rectifier: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)
        self.head = nn.Linear(2, CLASSES)
        self.rectifier = rectifier
        # Both channels are off together, and as often as they are on.
        nn.init.uniform_(self.second.weight, 0.5, 1.0)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rectifier(3 * self.second(self.first(x).tanh())).mean(1))


def off_rows(example: Case, layer: str) -> Tensor:
    """Rows of a layer that receive no gradient, (n, t)."""
    _, b = oracles.layer_tensors(example.model, layer, *example.data)  # (n, t, 1, o, k)
    return (b == 0).flatten(2).all(-1)


@settings
@pytest.mark.parametrize("name", RECTIFIERS)
def test_rows_behind_a_rectifier_that_is_off_stay(name, setting):
    """They are ordinary positions whose gradient happens to be zero: the plain formula."""
    example = seeded_case(lambda: Rectified(RECTIFIERS[name]), (6, 3))
    curvature = fitted(example, kfac_approx=setting)
    for layer in ("first", "second"):
        off = off_rows(example, layer)
        assert off.any() and not off.all()  # some rows are off, as the test needs
        assert_kfac_block(example, curvature, layer, setting)
    assert_dense_structures_are_exact(example)


class PaddedAndRectified(nn.Module):
    """Rows of zeros are padding; what is left goes through a rectifier."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 2), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x != 0).any(-1, keepdim=True)
        return self.head(((self.first(x) - 0.7).relu() * rows).sum(1) / rows.sum(1))


@settings
def test_padding_leaves_where_rectified_rows_stay(setting):
    example = seeded_case(PaddedAndRectified, (6, 3))
    for x, _ in example.batches:
        x[:, 4:] = 0
        x[0, 2:] = 0
    live = (example.x != 0).any(-1)
    assert (off_rows(example, "first") & live).any() and (~live).any()
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(example, curvature, "first", setting, live=live)


class MaxPooled(nn.Module):
    """linear -> tanh -> maximum over rows -> head."""

    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.head = nn.Linear(3, 2), nn.Linear(2, CLASSES)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.first(x).tanh()))


MAXIMA: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda h: h.amax(1),
    "max": lambda h: h.max(1).values,
    "max of a negative axis": lambda h: h.max(-2, keepdim=True).values[:, 0],
    "amax of two axes": lambda h: h.unflatten(1, (2, 3)).amax((1, -2)),
    "strided pool": lambda h: F.max_pool1d(h.mT, 2).mean(-1),
    "pool": lambda h: F.adaptive_max_pool1d(h.mT, 1)[..., 0],
}


@settings
@pytest.mark.parametrize("name", MAXIMA)
def test_rows_that_win_no_channel_of_a_maximum_stay(name, setting):
    """Which rows win is the data's choice of today: they are positions like the others."""
    example = seeded_case(lambda: MaxPooled(MAXIMA[name]), (6, 3))
    with torch.no_grad():
        rows = example.model.first(example.x).tanh()
    assert not (rows == rows.amax(1, keepdim=True)).any(-1).all()
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(example, curvature, "first", setting)
    assert_dense_structures_are_exact(example)
