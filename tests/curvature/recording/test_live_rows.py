"""Rows that happen to receive no gradient: behind a rectifier that is off, or beside a maximum."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from laws import (
    assert_dense_structures_are_exact,
    assert_kfac_block,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.estimate.finite import not_finite

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
    # The same functions, written by hand.
    "times a mask": lambda z: z * (z > 0),
    "times a mask of floats": lambda z: z * (z > 0).to(z.dtype),
    "where": lambda z: torch.where(z > 0, z, 0.0),
    "masked_fill": lambda z: z.masked_fill(z < 0, 0.0),
    "written into": lambda z: written(z.clone()),
    "half of z + |z|": lambda z: (z + z.abs()) / 2,
    "heaviside": lambda z: z * torch.heaviside(z.detach(), torch.zeros((), dtype=z.dtype)),
    "maximum of a stack": lambda z: torch.stack([z, torch.zeros_like(z)]).max(0).values,
}


def written(z: Tensor) -> Tensor:
    z[z < 0] = 0.0
    return z


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

    def __init__(self, rectifier: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.first, self.head = nn.Linear(3, 2), nn.Linear(2, CLASSES)
        self.rectifier = rectifier

    def forward(self, x: Tensor) -> Tensor:
        rows = (x != 0).any(-1, keepdim=True)
        return self.head((self.rectifier(self.first(x) - 0.7) * rows).sum(1) / rows.sum(1))


@settings
@pytest.mark.parametrize("name", ["relu", "times a mask", "where", "half of z + |z|"])
def test_padding_leaves_where_rectified_rows_stay(name, setting):
    example = seeded_case(lambda: PaddedAndRectified(RECTIFIERS[name]), (6, 3))
    for x, _ in example.batches:
        x[:, 4:] = 0
        x[0, 2:] = 0
    live = (example.x != 0).any(-1)
    assert (off_rows(example, "first") & live).any() and (~live).any()
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(example, curvature, "first", setting, live=live)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["relu", "times a mask", "half of z + |z|"])
def test_precision_does_not_decide_which_rows_count(name, dtype, setting):
    """A of the first layer holds inputs alone: it is that of float64, up to their rounding."""
    x, y = torch.randn(30, 6, 3), torch.randint(0, CLASSES, (30,))

    def inputs(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(4)
        model = Rectified(RECTIFIERS[name]).to(dtype)
        found = Curvature(model, "classification", kfac_approx=setting).fit([(x.to(dtype), y)])
        return found.blocks["first.weight"].factors.input.double()

    exact = inputs(torch.float64)
    assert relative_error(inputs(dtype), exact) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("score", [-60.0, -1e4, -float("inf")])
def test_masks_by_scores_too_small_for_float32_are_masks(score):
    """exp(−60) is no zero, but what is multiplied by it in float64 would not be seen in others."""

    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 2), nn.Linear(2, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.where((x != 0).any(-1), 0.0, 2 * score)
            return self.head((scores.softmax(1)[..., None] * self.first(x).tanh()).sum(1))

    example = seeded_case(Weighted, (6, 3))
    for x, _ in example.batches:
        x[:, 4:] = 0
    found = fitted(example, kfac_approx="expand").blocks["first.weight"].factors.input[0]
    rows = torch.cat([example.x, torch.ones_like(example.x[..., :1])], -1)[:, :4].flatten(0, 1)
    assert relative_error(found, rows.mT @ rows / len(rows)) < 1e-12


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
    "topk": lambda h: h.topk(1, 1).values[:, 0],
    "sort": lambda h: h.sort(1).values[:, -1],
    "kthvalue": lambda h: h.kthvalue(h.shape[1], 1).values,
    "quantile": lambda h: h.quantile(1.0, dim=1),
    "cummax": lambda h: h.cummax(1).values[:, -1],
    "gather": lambda h: h.gather(1, h.argmax(1, keepdim=True))[:, 0],
    "one-hot": lambda h: (h * F.one_hot(h.argmax(1), h.shape[1]).mT).sum(1),
    "one after another": lambda h: reduce(torch.maximum, h.unbind(1)),
    "two of them": lambda h: h.topk(2, 1).values.mean(1),
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


class Particular(nn.Module):
    """A rectified network that knows no values above a bound, as a look-up or a check may."""

    def __init__(self, error: Exception):
        super().__init__()
        self.first, self.head, self.error = nn.Linear(3, 2), nn.Linear(2, CLASSES), error

    def forward(self, x: Tensor) -> Tensor:
        rows = (x != 0).any(-1, keepdim=True)
        h = F.relu(self.first(x))
        if float(h.detach().max()) > self.bound:
            raise self.error
        return self.head((h * rows).sum(1))

    bound = torch.inf


def particular(error: Exception) -> tuple[Particular, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Particular(error).double()
    x, y = torch.randn(8, 6, 3).double(), torch.arange(8) % CLASSES
    x[:, 4:] = 0
    with torch.no_grad():
        model.bound = 1.0001 * float(F.relu(model.first(x)).max())
    return model, (x, y)


@pytest.mark.parametrize("kind", [IndexError, ValueError, RuntimeError, KeyError, AssertionError])
def test_a_model_that_cannot_run_with_moved_rows_teaches_nothing(kind):
    model, (x, y) = particular(kind("a value out of range"))
    fit = Curvature(model, "classification").fit([(x, y), (x[:5], y[:5])])
    assert fit.n_data == 13 and not_finite(fit.blocks) is None


@pytest.mark.parametrize("words", ["can't allocate memory", "CUDA out of memory", "std::bad_alloc"])
def test_memory_that_runs_out_with_moved_rows_is_raised(words):
    model, batch = particular(RuntimeError(words))
    with pytest.raises(RuntimeError, match="memory|alloc"):
        Curvature(model, "classification").fit([batch])
