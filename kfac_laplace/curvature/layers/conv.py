"""Convolutions: a linear layer whose rows are patches, shared over the output positions."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.lags import lag_gram, lags_apply
from kfac_laplace.curvature.layers.registry import Inputs, Layer, layer_rule
from kfac_laplace.curvature.precision import accumulable, gram, summable
from kfac_laplace.curvature.sharing import Axis, Grouping

#: Patches of so many bytes at most exist at a time while a Gram matrix is summed.
PATCH_BUDGET = 64 * 2**20
#: From so many channels on, products lag by lag are faster than products of patches.
LAG_CHANNELS = 8


@dataclass(frozen=True)
class Patches(Inputs):
    """Rows cut out of a padded input, made in pieces and only where nothing else will do.

    Args:
        padded: input with its padding, shape (n, c, *space).
        groups: number of channel groups b.
        kernel: kernel size.
        stride: stride.
        dilation: dilation.
        zeros: width of the margin of zeros at both ends of each spatial axis; () for none.
    """

    padded: Tensor
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    zeros: tuple[int, ...] = ()

    @property
    def lead(self) -> tuple[int, ...]:
        """(n, output positions)."""
        return self.padded.shape[0], prod(self._positions)

    @property
    def _positions(self) -> tuple[int, ...]:
        """Output size along each spatial axis."""
        space = self.padded.shape[2:]
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return tuple((s - w) // r + 1 for s, w, r in zip(space, spans, self.stride, strict=True))

    def _view(self, padded: Tensor) -> Tensor:
        """Patches as an overlapping view, shape (n, c, *kernel, *positions)."""
        padded = padded.contiguous()
        steps = padded.stride()[2:]
        return padded.as_strided(
            (*padded.shape[:2], *self.kernel, *self._positions),
            (
                *padded.stride()[:2],
                *(s * d for s, d in zip(steps, self.dilation, strict=True)),
                *(s * r for s, r in zip(steps, self.stride, strict=True)),
            ),
        )

    def _rows(self, padded: Tensor) -> Tensor:
        """Patches of some examples as rows (b, n, t, i)."""
        n, b, t = padded.shape[0], self.groups, prod(self._positions)
        return self._view(padded).reshape(n, b, -1, t).permute(1, 0, 3, 2)

    def rows(self) -> Tensor:
        """All patches, shape (b, n, t, i)."""
        return self._rows(self.padded)

    def gram(self) -> Tensor:
        """Σ a aᵀ, lag by lag where that is faster, in chunks of examples under the byte budget."""
        c = self.padded.shape[1]
        by_lags = c // self.groups >= LAG_CHANNELS and prod(self.kernel) > 1
        by_lags &= lags_apply(self._positions, self.kernel, self.stride, self.dilation)
        copies = 3 if by_lags else 2 * prod(self.kernel)
        example = copies * prod(self.padded.shape[1:]) * 8
        pieces = self.padded.split(max(1, PATCH_BUDGET // max(1, example)))
        grams = (self._lag_gram(p) if by_lags else self._patch_gram(p) for p in pieces)
        return torch.stack(list(grams)).sum(0) if len(pieces) > 1 else next(grams)

    def _lag_gram(self, padded: Tensor) -> Tensor:
        """Σ a aᵀ of some examples without patches."""
        columns = summable(padded).unflatten(1, (self.groups, -1)).movedim(0, -1).contiguous()
        zeros = self.zeros or (0,) * len(self.kernel)
        return lag_gram(columns, self.kernel, self.dilation, zeros)

    def _patch_gram(self, padded: Tensor) -> Tensor:
        """Σ a aᵀ of some examples by one product over all their positions."""
        patches = self._view(summable(padded)).movedim(0, 1 + len(self.kernel))
        i = padded.shape[1] // self.groups * prod(self.kernel)
        return gram(patches.reshape(self.groups, i, -1).mT)

    def row_sum(self) -> Tensor:
        """Σ a, shape (b, i), without patches."""
        return self._window_sums().double().sum(1)

    def example_sums(self, grouping: Grouping, n: int) -> Tensor:
        """Σ_t a for each example, shape (b, n, i), without patches."""
        if isinstance(grouping, Axis) and grouping.axis != 0:
            return super().example_sums(grouping, n)
        sums = self._window_sums()[:, :, None]  # (b, n k, 1, i)
        return grouping.by_example(sums, n, block_axis=0).sum(2)

    def _window_sums(self) -> Tensor:
        """Sum of each kernel entry's inputs over the positions, shape (b, n, i)."""
        sums = self.padded
        for axis, (kernel, stride, dilation, size) in enumerate(
            zip(self.kernel, self.stride, self.dilation, self._positions, strict=True)
        ):
            windows = _windows(sums.shape[2 + axis], kernel, stride, dilation, size).to(sums)
            sums = torch.tensordot(sums, windows, dims=([2 + axis], [1])).movedim(-1, 2 + axis)
        return sums.reshape(sums.shape[0], self.groups, -1).movedim(1, 0)


@lru_cache(maxsize=64)
def _windows(length: int, kernel: int, stride: int, dilation: int, size: int) -> Tensor:
    """For each kernel entry a row (length,) with ones at the places that it visits."""
    windows = torch.zeros(kernel, length)
    for k in range(kernel):
        windows[k, k * dilation : k * dilation + (size - 1) * stride + 1 : stride] = 1
    return windows


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
    zeros = tuple(map(min, zip(margins[::2], margins[1::2], strict=True)))[::-1]
    padded = F.pad(batch, margins)
    patches = Patches(padded, groups, kernel, per_axis(stride, dims), dilation, zeros)
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
) -> list[int]:
    """Margins (left, right) of each axis, last axis first as `F.pad` wants them."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        sizes = (0,) * len(kernel) if padding == "valid" else per_axis(padding, len(kernel))  # type: ignore[arg-type]
        pairs = [(size, size) for size in sizes]
    return [margin for pair in reversed(pairs) for margin in pair]
