"""Convolutions: a linear layer whose rows are patches, shared over the output positions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.lags import lag_products, lags_apply
from kfac_laplace.curvature.layers.registry import Layer, layer_rule
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.linalg.gram import CACHED_ENTRIES, Gram
from kfac_laplace.curvature.model.budget import Budget, at_once
from kfac_laplace.curvature.rows.inputs import Inputs
from kfac_laplace.curvature.rows.row_layout import Axis, RowLayout

#: From so many channels on, products lag by lag are faster than products of patches.
LAG_CHANNELS = 8

Margins = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Patches(Inputs):
    """Rows cut out of an input with margins of zeros, made in pieces and only where needed.

    Args:
        data: input, shape (n, c, *space).
        groups: number of channel groups b.
        kernel: kernel size.
        stride: stride.
        dilation: dilation.
        margins: width of the margins of zeros before and after each spatial axis.
    """

    data: Tensor
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    margins: Margins

    @property
    def lead(self) -> tuple[int, ...]:
        """(n, output positions)."""
        return self.data.shape[0], prod(self._positions)

    @property
    def _positions(self) -> tuple[int, ...]:
        """Output size along each spatial axis."""
        space = [s + sum(m) for s, m in zip(self.data.shape[2:], self.margins, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return tuple((s - w) // r + 1 for s, w, r in zip(space, spans, self.stride, strict=True))

    def _view(self, data: Tensor) -> Tensor:
        """Patches as an overlapping view, shape (n, c, *kernel, *positions)."""
        padded = F.pad(data, [width for pair in reversed(self.margins) for width in pair])
        steps = padded.stride()[2:]
        return padded.as_strided(
            (*padded.shape[:2], *self.kernel, *self._positions),
            (
                *padded.stride()[:2],
                *(s * d for s, d in zip(steps, self.dilation, strict=True)),
                *(s * r for s, r in zip(steps, self.stride, strict=True)),
            ),
            padded.storage_offset(),
        )

    def rows(self) -> Tensor:
        """All patches, shape (b, n, t, i)."""
        n, b, t = self.data.shape[0], self.groups, prod(self._positions)
        return self._view(self.data).reshape(n, b, -1, t).permute(1, 0, 3, 2)

    def split(self, step: int) -> Iterator[Inputs]:
        """The patches of some examples at a time."""
        return (replace(self, data=data) for data in self.data.split(step))

    @property
    def _by_lags(self) -> bool:
        """Whether products lag by lag are possible and faster."""
        c, entries = self.data.shape[1] // self.groups, prod(self.kernel)
        if c < LAG_CHANNELS or entries == 1 or 4 * self.count <= c * entries:
            return False  # the last: rows so few are kept
        return lags_apply(self._positions, self.kernel, self.stride, self.dilation)

    def gram(self, dtype: SumDtype, budget: Budget) -> Gram | Tensor:
        """Σ a aᵀ, lag by lag where that is faster."""
        if not self._by_lags:
            return super().gram(dtype, budget)
        i = self.data.shape[1] // self.groups * prod(self.kernel)
        out = self.data.new_empty(self.groups, i, i, dtype=dtype.sums(self.data))
        self._fill(out, dtype, budget)
        return Gram.of(out)

    def bordered_gram(self, dtype: SumDtype, budget: Budget) -> Gram | None:
        """[[Σ a aᵀ, Σ a], [Σ aᵀ, count]] where products go lag by lag."""
        if not self._by_lags:
            return None
        border = self.row_sum(dtype)
        b, i = border.shape
        out = self.data.new_empty(b, i + 1, i + 1, dtype=dtype.sums(self.data))
        self._fill(out[:, :i, :i], dtype, budget)
        out[:, i, :i] = border  # what is above the diagonal does not matter
        out[:, i, i] = self.count
        return Gram.of(out)

    def _fill(self, out: Tensor, dtype: SumDtype, budget: Budget) -> None:
        """Write Σ a aᵀ into `out` (b, i, i), copies of some examples at a time."""
        c, entries = self.data.shape[1] // self.groups, prod(self.kernel)
        step = at_once(self.data[:1].numel(), budget.patches(self.data))
        products: dict[tuple[int, int], Tensor] = {}
        for piece in self.data.split(step):
            places = self._places(piece, dtype.products(piece))
            found = lag_products(places, self.kernel, self.dilation, self.margins)
            for one, other, total in found:
                known = products.get((one, other))
                products[one, other] = total if known is None else known.to(out.dtype) + total
        table = out.unflatten(2, (c, entries)).unflatten(1, (c, entries))
        for one in range(entries):
            row = [
                products[one, k] if (one, k) in products else products[k, one].mT
                for k in range(entries)
            ]
            table[:, :, one] = torch.stack(row, -1)  # (b, c, c, k)

    def _places(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        """Inputs of some examples as (b, *space, n, c)."""
        places = data.unflatten(1, (self.groups, -1)).movedim(0, -1).movedim(1, -1)
        return places.to(dtype).contiguous()

    def pieces(self, dtype: SumDtype, budget: Budget) -> Iterator[Tensor]:
        """Patches of some examples at a time, (b, n, t, i), in the precision of their products."""
        limit = budget.patches(self.data)
        if self.groups == 1:  # one product is added to in place: patches may stay in the cache
            limit = min(limit, CACHED_ENTRIES)
        example = self.lead[1] * self.data.shape[1] * prod(self.kernel)
        for data in self.data.split(at_once(example, limit)):
            patches = self._view(data).unflatten(1, (self.groups, -1))
            dims = len(self.kernel)  # of (n, b, c, *kernel, *positions)
            rows = patches.permute(1, 0, *range(3 + dims, 3 + 2 * dims), *range(2, 3 + dims))
            width = self.data.shape[1] // self.groups * prod(self.kernel)
            yield rows.to(dtype.products(data)).reshape(self.groups, len(data), -1, width)

    def row_sum(self, dtype: SumDtype) -> Tensor:
        """Σ a, shape (b, i), without patches."""
        total = self.data.to(dtype.products(self.data)).sum(0, keepdim=True)
        return replace(self, data=dtype.summable(total))._window_sums()[:, 0]

    def example_sums(self, row_layout: RowLayout, n: int) -> Tensor:
        """Σ_t a for each example, shape (b, n, i), without patches."""
        if isinstance(row_layout, Axis) and row_layout.axis != 0:
            return super().example_sums(row_layout, n)
        sums = self._window_sums()[:, :, None]  # (b, n k, 1, i)
        return row_layout.by_example(sums, n, block_axis=0).sum(2)

    def _window_sums(self) -> Tensor:
        """Sum of each kernel entry's inputs over the positions, shape (b, n, i)."""
        last = self.data.is_contiguous(memory_format=torch.channels_last) and len(self.kernel) == 2
        sums = self.data.movedim(1, -1) if last else self.data.flatten(0, 1)
        lead, channels = sums.shape[0], self.data.shape[1]
        for kernel, stride, dilation, size, margins, length in zip(
            self.kernel,
            self.stride,
            self.dilation,
            self._positions,
            self.margins,
            self.data.shape[2:],
            strict=True,
        ):
            like = sums.dtype, sums.device
            windows = _windows(length, margins[0], kernel, stride, dilation, size, *like)
            sums = windows @ sums.reshape(lead, length, -1)  # (lead, kernel, rest)
            lead *= kernel
        sums = sums.reshape(len(self.data), -1, channels).mT if last else sums
        return sums.reshape(len(self.data), self.groups, -1).movedim(1, 0)


@lru_cache(maxsize=64)
def _windows(
    length: int,
    before: int,
    kernel: int,
    stride: int,
    dilation: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """For each kernel entry a row (length,) with ones at the places that it visits."""
    with torch.inference_mode(False):  # kept, so of use outside inference mode as well
        windows = torch.zeros(kernel, length, device="cpu")
        for k in range(kernel):
            visited = torch.arange(size, device="cpu") * stride + k * dilation - before
            windows[k, visited[(visited >= 0) & (visited < length)]] = 1
        return windows.to(device, dtype)


@layer_rule(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
def conv(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Layer:
    """Grouped, strided, dilated convolution: one block for each group, patches as rows."""
    dims = weight.ndim - 2
    kernel = tuple(weight.shape[2:])
    dilation = per_axis(dilation, dims)
    out_channels = weight.shape[0]

    def output_rows(grad: Tensor) -> Tensor:
        rows = grad.reshape(grad.shape[0], -1, groups, out_channels // groups, positions)
        return rows.permute(0, 2, 1, 4, 3)  # (v, b, n, t, o)

    data = accumulable(input.detach())
    batch = data if data.ndim == dims + 2 else data[None]
    margins = _margins(padding, kernel, dilation)
    patches = Patches(batch, groups, kernel, per_axis(stride, dims), dilation, margins)
    positions = patches.lead[1]
    return Layer(
        weight=weight,
        bias=bias,
        matrix=(groups, out_channels // groups, weight[0].numel()),
        data=(input,),
        inputs=patches,
        output_rows=output_rows,
    )


def per_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Spell a setting out for each spatial axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _margins(
    padding: int | str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> Margins:
    """Margins before and after each axis."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    sizes = (0,) * len(kernel) if padding == "valid" else per_axis(padding, len(kernel))  # type: ignore[arg-type]
    return tuple((size, size) for size in sizes)
