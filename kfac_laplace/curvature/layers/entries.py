"""Layers whose weight scales entry by entry: each entry is a matrix of its own, (p, 1, 1)."""

from collections.abc import Callable, Sequence

from torch import Tensor

from kfac_laplace.curvature.layers.registry import Layer, Rows

Entries = Callable[[Tensor], Tensor]


def entries_first(ndim: int, own: Sequence[int]) -> Entries:
    """Take outputs (v, *shape) to rows (v, p, *lead, 1), where axes `own` run over the entries."""
    lead = [axis for axis in range(ndim) if axis not in own]

    def entries(tensor: Tensor) -> Tensor:
        moved = tensor.permute(0, *(1 + axis for axis in own), *(1 + axis for axis in lead))
        shape = [tensor.shape[1 + axis] for axis in lead]
        return moved.reshape(tensor.shape[0], -1, *shape, 1)

    return entries


def scaled(
    weight: Tensor, bias: Tensor | None, input: Tensor, factor: Tensor, own: Sequence[int]
) -> Layer | None:
    """The layer output = weight · factor + bias, up to what does not depend on the two.

    Args:
        weight: weight with p entries.
        bias: bias with p entries, or None.
        input: what the graph goes on from below the layer.
        factor: what meets the weight, shaped like the output, outside the graph.
        own: axes of the output that run over the entries; along the others they are repeated.

    Returns:
        The layer, or None where no axis is left that could run over the examples.
    """
    if len(own) >= factor.ndim:
        return None
    entries = entries_first(factor.ndim, own)
    return Layer(
        weight=weight,
        bias=bias,
        matrix=(weight.numel(), 1, 1),
        data=(input,),
        inputs=Rows(entries(factor[None])[0]),
        output_rows=entries,
        kronecker=False,
    )
