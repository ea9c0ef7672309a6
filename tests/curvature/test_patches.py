"""Input factors of convolutions without patches equal those with patches."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error
from torch import Tensor

from kfac_laplace.curvature.layers.conv import Patches
from kfac_laplace.curvature.layers.lags import lag_products, lags_apply
from kfac_laplace.curvature.sharing import Axis

# Sums of at most some thousand products, in another order.
EXACT = 1e-13

SHAPES = {
    # name: (space, kernel, stride, dilation, padding, groups)
    "1d": ((9,), (3,), (1,), (1,), (1,), 1),
    "1d, even kernel": ((9,), (4,), (1,), (1,), (0,), 1),
    "1d, dilated": ((9,), (3,), (1,), (2,), (2,), 1),
    "2d": ((6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d, unpadded": ((6, 7), (3, 2), (1, 1), (1, 1), (0, 0), 1),
    "2d, padded more than needed": ((5, 6), (2, 3), (1, 1), (1, 1), (3, 2), 1),
    "2d, groups": ((6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "2d, dilated one way": ((9, 6), (3, 3), (1, 1), (2, 1), (2, 1), 1),
    "2d, smallest": ((4, 4), (3, 3), (1, 1), (1, 1), (0, 0), 1),
    "3d": ((4, 5, 4), (2, 3, 2), (1, 1, 1), (1, 1, 1), (0, 1, 1), 1),
    "strided": ((7, 8), (3, 3), (2, 3), (1, 1), (1, 1), 1),
    "pointwise": ((4, 4), (1, 1), (1, 1), (1, 1), (0, 0), 1),
}


def patches_of(name: str, channels: int = 4, n: int = 3) -> tuple[Patches, Tensor]:
    """Patches, and their rows one by one."""
    space, kernel, stride, dilation, padding, groups = SHAPES[name]
    x = torch.randn(n, channels, *space, dtype=torch.float64)
    padded = F.pad(x, [p for side in reversed(padding) for p in (side, side)])
    margins = tuple((width, width) for width in padding)
    patches = Patches(x, groups, kernel, stride, dilation, margins)
    rows = []
    sizes = [
        (s - d * (k - 1) - 1) // r + 1
        for s, k, r, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    for place in product(*map(range, sizes)):
        cut = padded
        for axis, (p, k, r, d) in enumerate(zip(place, kernel, stride, dilation, strict=True)):
            cut = cut.index_select(2 + axis, torch.arange(k) * d + p * r)
        rows.append(cut.reshape(n, groups, -1))
    return patches, torch.stack(rows, 2).movedim(1, 0)  # (b, n, t, i)


@pytest.mark.parametrize("name", SHAPES)
def test_gram_and_sums_equal_those_of_the_rows(name, monkeypatch):
    for least in (1, 1000):  # lag by lag, and by patches
        monkeypatch.setattr("kfac_laplace.curvature.layers.conv.LAG_CHANNELS", least)
        patches, rows = patches_of(name)
        want = torch.einsum("bnti,bntj->bij", rows, rows)
        assert relative_error(patches.gram(), want) < EXACT
    assert relative_error(patches.example_sums(Axis(0), 3), rows.sum(2)) < EXACT
    assert relative_error(patches.row_sum(), rows.sum((1, 2))) < EXACT


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "strided"])
def test_products_by_lag_cover_all_pairs_of_kernel_entries(name):
    patches, rows = patches_of(name)
    c = patches.data.shape[1] // patches.groups
    places = patches.data.unflatten(1, (-1, c)).movedim(0, -1).movedim(1, -1).contiguous()
    want = torch.einsum("bnti,bntj->bij", rows, rows)
    want = want.unflatten(2, (c, -1)).unflatten(1, (c, -1))
    found = set()
    for one, other, got in lag_products(places, patches.kernel, patches.dilation, patches.margins):
        assert relative_error(got, want[:, :, one, :, other]) < EXACT
        found |= {(one, other), (other, one)}
    entries = range(want.shape[2])
    assert found == set(product(entries, entries))


def test_where_lags_apply():
    assert lags_apply((3, 3), (3, 3), (1, 1), (1, 1))
    assert not lags_apply((2, 3), (3, 3), (1, 1), (1, 1))  # no place that all windows share
    assert not lags_apply((4, 4), (3, 3), (1, 1), (2, 2))
    assert not lags_apply((8, 8), (3, 3), (1, 2), (1, 1))


def test_small_budgets_change_nothing(monkeypatch):
    patches, rows = patches_of("2d")
    monkeypatch.setattr("kfac_laplace.curvature.layers.conv.PATCH_BUDGET", 1)
    for least in (1, 1000):
        monkeypatch.setattr("kfac_laplace.curvature.layers.conv.LAG_CHANNELS", least)
        assert relative_error(patches.gram(), torch.einsum("bnti,bntj->bij", rows, rows)) < EXACT
