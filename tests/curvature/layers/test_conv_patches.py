"""Input factors of convolutions without patches equal those with patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from laws import relative_error
from torch import Tensor

from kfac_laplace.curvature.layers.conv import Patches, _windows, conv
from kfac_laplace.curvature.layers.lags import lag_products, lags_apply
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.row_layout import Axis

# Sums of at most some thousand products, in another order.
EXACT = 1e-13
DOUBLE, SHARED = SumDtype(torch.float64), SumDtype("auto", shared=True)
WHOLE, TINY = Budget(), Budget(1)

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


def gram_of(patches: Patches, dtype: SumDtype = DOUBLE, budget: Budget = WHOLE) -> Tensor:
    """Σ a aᵀ as matrices."""
    return patches.gram(dtype, budget).matrices()


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
        assert relative_error(gram_of(patches), want) < EXACT
    assert relative_error(patches.example_sums(Axis(0), 3), rows.sum(2)) < EXACT
    assert relative_error(patches.row_sum(DOUBLE), rows.sum((1, 2))) < EXACT


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
    for least in (1, 1000):
        monkeypatch.setattr("kfac_laplace.curvature.layers.conv.LAG_CHANNELS", least)
        found = gram_of(patches, budget=TINY)
        assert relative_error(found, torch.einsum("bnti,bntj->bij", rows, rows)) < EXACT


IMAGES = [name for name, (space, *_) in SHAPES.items() if len(space) == 2]

# Uneven margins: (space, kernel, dilation, margins before and after each axis)
UNEVEN = {
    "1d": ((9,), (4,), (1,), ((1, 2),)),
    "1d, dilated": ((11,), (2,), (3,), ((1, 2),)),
    "2d": ((6, 7), (2, 4), (1, 1), ((0, 1), (1, 2))),
    "2d, one axis": ((6, 7), (3, 2), (1, 1), ((1, 1), (0, 1))),
    "2d, all on one side": ((6, 7), (3, 3), (1, 1), ((0, 2), (2, 0))),
    "2d, wider than the kernel": ((4, 4), (2, 3), (1, 1), ((3, 0), (0, 4))),
    "3d": ((4, 3, 4), (2, 2, 1), (1, 1, 1), ((0, 1), (1, 0), (0, 0))),
}


def both_ways(
    monkeypatch, patches: Patches, dtype: SumDtype = DOUBLE, budget: Budget = WHOLE
) -> Iterator[Tensor]:
    """Gram matrices lag by lag where that applies, and by patches."""
    for least in (1, 1000):
        monkeypatch.setattr("kfac_laplace.curvature.layers.conv.LAG_CHANNELS", least)
        yield gram_of(patches, dtype, budget)


def assert_sums_of(
    rows: Tensor,
    patches: Patches,
    monkeypatch,
    tolerance: float = EXACT,
    dtype: SumDtype = DOUBLE,
) -> None:
    """The Gram matrix and the sums are those of the rows (b, n, t, i)."""
    rows = rows.double()
    for gram in both_ways(monkeypatch, patches, dtype):
        assert relative_error(gram, torch.einsum("bnti,bntj->bij", rows, rows)) < tolerance
    n = rows.shape[1]
    assert relative_error(patches.example_sums(Axis(0), n).double(), rows.sum(2)) < tolerance
    assert relative_error(patches.row_sum(dtype), rows.sum((1, 2))) < tolerance
    assert torch.equal(patches.rows().double(), rows)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_channels_last_changes_nothing(name, n, monkeypatch):
    for channels in (2, 4):
        patches, rows = patches_of(name, channels, n)
        data = patches.data.contiguous(memory_format=torch.channels_last)
        assert data.stride() != patches.data.stride()
        assert_sums_of(rows, replace(patches, data=data), monkeypatch)


@pytest.mark.parametrize("name", SHAPES)
def test_a_single_example_and_parts_of_larger_tensors(name, monkeypatch):
    assert_sums_of(*reversed(patches_of(name, n=1)), monkeypatch)
    patches, rows = patches_of(name, n=4)
    every_other = replace(patches, data=patches.data[::2])
    assert_sums_of(rows[:, ::2], every_other, monkeypatch)
    repeated = replace(patches, data=patches.data[:1].expand_as(patches.data))
    assert_sums_of(rows[:, :1].expand_as(rows), repeated, monkeypatch)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", UNEVEN)
def test_margins_may_be_wider_on_one_side(name, order, monkeypatch):
    space, kernel, dilation, margins = UNEVEN[name]
    x = torch.randn(3, 4, *space, dtype=torch.float64)
    padded = F.pad(x, [width for pair in reversed(margins) for width in pair])
    ones = (1,) * len(space)
    plain = Patches(padded, 2, kernel, ones, dilation, ((0, 0),) * len(space))
    if len(space) == 2:
        x = x.contiguous(memory_format=order)
    assert_sums_of(plain.rows(), Patches(x, 2, kernel, ones, dilation, margins), monkeypatch)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch is slower there
@pytest.mark.parametrize(("kernel", "dilation"), [((2, 4), (1, 1)), ((4, 3), (1, 2))])
def test_rows_of_same_padding_meet_the_weight_as_the_convolution_has_it(kernel, dilation):
    x, weight = torch.randn(2, 3, 5, 7).double(), torch.randn(4, 3, *kernel).double()
    weight.requires_grad_()
    output = F.conv2d(x, weight, None, 1, "same", dilation)
    layer = conv(output, x, weight, None, 1, "same", dilation)
    (rows,) = layer.inputs.rows()  # (n, t, i)
    want = rows @ weight.flatten(1).mT  # (n, t, o)
    torch.testing.assert_close(output.flatten(2).mT, want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["2d", "2d, groups", "strided"])
def test_pieces_of_single_precision_add_in_double(name, order, monkeypatch):
    """A float32 total would swallow the others beside one example that is far larger."""
    monkeypatch.setattr("kfac_laplace.curvature.linalg.gram.MANY_ROWS", 1)
    # An example has more rows than these have entries: otherwise products would wait for more.
    patches, _ = patches_of(name, 1 if name == "strided" else 4, n=50)
    data = (patches.data.abs() + 1).float()
    data[0] *= 1e4
    single = replace(patches, data=data.contiguous(memory_format=order))
    alone, others = replace(single, data=data[:1]), replace(single, data=data[1:])
    # One example at a time.
    together = list(both_ways(monkeypatch, single, SHARED, TINY))
    first = list(both_ways(monkeypatch, alone, SHARED, TINY))
    for total, swallowing in zip(together, first, strict=True):
        assert total.dtype == swallowing.dtype == torch.float64
        rows = others.rows().double()
        want = torch.einsum("bnti,bntj->bij", rows, rows)
        # A few eps of the others' own size; the large example is 10^8 times as large.
        assert relative_error(total - swallowing, want) < 1e-6


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", IMAGES)
def test_single_precision_keeps_its_digits(name, order, monkeypatch):
    patches, rows = patches_of(name, n=5)
    data = patches.data.float()
    single = replace(patches, data=data.contiguous(memory_format=order))
    rows = replace(patches, data=data.double()).rows()
    # Some hundred float32 products: a few eps of 1.2e-7.
    assert_sums_of(rows, single, monkeypatch, 1e-6, SHARED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_windows_kept_from_inference_mode_serve_outside(dtype):
    _windows.cache_clear()
    with torch.inference_mode():
        made = _windows(6, 0, 3, 1, 1, 4, dtype, torch.device("cpu"))
    assert not made.is_inference()
