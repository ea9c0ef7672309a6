"""Transposed convolutions: convolutions of the input spread out by the stride, kernels mirrored."""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.conv import Patches, per_axis
from kfac_laplace.curvature.layers.registry import Layer, layer_rule
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.rows.layout import Fold

Setting = int | tuple[int, ...]


@layer_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Setting = 1,
    padding: Setting = 0,
    output_padding: Setting = 0,
    groups: int = 1,
    dilation: Setting = 1,
) -> Layer:
    """One block for each group; the rows are patches of the input with zeros between its entries.

    With stride r, padding p and dilation d the output at position t is Σ_k w_k z_{t + p − d k},
    where z holds the input at the multiples of r. The index runs against k, so the patches are cut
    out of a mirrored z: their entries then lie as those of the kernel do, and the positions run
    backwards.
    """
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    space = tuple(range(-dims, 0))
    in_channels, out_channels = weight.shape[0] // groups, weight.shape[1]
    dilation = per_axis(dilation, dims)

    data = accumulable(input.detach())
    batch = data if data.ndim == dims + 2 else data[None]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    margins = _margins(reach, per_axis(padding, dims), per_axis(output_padding, dims))
    padded = F.pad(_spread_out(batch, per_axis(stride, dims)), margins)
    none = ((0, 0),) * dims
    patches = Patches(padded.flip(space), groups, kernel, (1,) * dims, dilation, none)

    def output_rows(grad: Tensor) -> Tensor:
        rows = grad.flip(space).reshape(grad.shape[0], -1, groups, out_channels, patches.lead[1])
        return rows.permute(0, 2, 1, 4, 3)  # (v, b, n, t, o)

    return Layer(
        weight=weight,
        bias=bias,
        matrix=(groups, out_channels, in_channels * prod(kernel)),
        data=(input,),
        inputs=patches,
        output_rows=output_rows,
        fold=Fold((groups, in_channels, out_channels, prod(kernel)), (0, 2, 1, 3)),
    )


def _spread_out(batch: Tensor, steps: Sequence[int]) -> Tensor:
    """Put zeros between the entries of (n, c, *space), steps[d] − 1 of them along axis d."""
    if all(step == 1 for step in steps):
        return batch
    sizes = [(size - 1) * step + 1 for size, step in zip(batch.shape[2:], steps, strict=True)]
    spread = batch.new_zeros(*batch.shape[:2], *sizes)
    every: list[slice] = [slice(None, None, step) for step in steps]
    spread[(slice(None), slice(None), *every)] = batch
    return spread


def _margins(
    reach: Sequence[int], padding: Sequence[int], output_padding: Sequence[int]
) -> list[int]:
    """Margins (left, right) of each axis, last axis first as `F.pad` wants them; they may crop."""
    pairs = [
        (r - p, r - p + more) for r, p, more in zip(reach, padding, output_padding, strict=True)
    ]
    return [margin for pair in reversed(pairs) for margin in pair]
