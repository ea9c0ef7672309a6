"""Parameters that scale or shift: their per-example gradients come straight from the output's.

Each entry is a block of its own, (p, 1, 1): its gradient is Σ_t g_t x_t over the axes along which
the entry is repeated. They get an exact block, without a pass through the whole model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.layers.registry import (
    Layer,
    layer_rule,
    operator_rule,
    repetition_rule,
)
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.rows.inputs import Inputs, Ones, Rows

#: takes outputs (v, *shape) to rows (v, p, *lead, 1)
Entries = Callable[[Tensor], Tensor]


@operator_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def add(
    output: Tensor, weight: Tensor, input: Tensor, other: Tensor, **options: object
) -> Layer | None:
    """A parameter added to an activation, as position embeddings are."""
    entries = _repeated_entries(output, weight)
    data = other if input is weight else input
    if entries is None or options:
        return None
    below = (data,) if isinstance(data, Tensor) else ()
    return _broadcast(weight, below, _ones(entries, output, weight), entries)


@operator_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(
    output: Tensor, weight: Tensor, input: Tensor, other: Tensor, **options: object
) -> Layer | None:
    """A parameter that multiplies an activation, as layer scales and gates are."""
    entries = _repeated_entries(output, weight)
    data = other if input is weight else input
    if entries is None or options:
        return None
    factor = Rows(entries(data.detach().expand_as(output)[None])[0])
    return _broadcast(weight, (data,), factor, entries)


@layer_rule(torch.prelu, Tensor.prelu)
def prelu(output: Tensor, input: Tensor, weight: Tensor) -> Layer | None:
    """max(x, 0) + w · min(x, 0), with one slope w or one for each channel (axis 1)."""
    below = accumulable(input.detach()).clamp(max=0)
    return scaled(weight, None, input, below, [1] if weight.numel() > 1 else [])


@repetition_rule(
    Tensor.expand,
    Tensor.expand_as,
    Tensor.repeat,
    Tensor.tile,
    torch.tile,
    torch.broadcast_to,
    Tensor.broadcast_to,
)
def repeated(output: Tensor, n: int, weight: Tensor, *args: Any, **options: Any) -> Layer | None:
    """A parameter repeated over n examples, as class tokens are; None for other repetitions."""
    offset = output.ndim - weight.ndim
    if not any(
        size == n and (axis < offset or weight.shape[axis - offset] == 1)
        for axis, size in enumerate(output.shape)
    ):
        return None
    entries = _repeated_entries(output, weight)
    if entries is None:
        return None
    return _broadcast(weight, (), _ones(entries, output, weight), entries)


@operator_rule(Tensor.expand_as)
def expand_as(output: Tensor, weight: Tensor, input: Tensor, other: Tensor) -> Layer | None:
    """A parameter repeated as often as there are examples in `other`."""
    return repeated(output, len(output), weight) if input is weight else None


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


def entries_first(ndim: int, own: Sequence[int]) -> Entries:
    """Take outputs (v, *shape) to rows (v, p, *lead, 1), where axes `own` run over the entries."""
    lead = [axis for axis in range(ndim) if axis not in own]

    def entries(tensor: Tensor) -> Tensor:
        moved = tensor.permute(0, *(1 + axis for axis in own), *(1 + axis for axis in lead))
        shape = [tensor.shape[1 + axis] for axis in lead]
        return moved.reshape(tensor.shape[0], -1, *shape, 1)

    return entries


def _broadcast(weight: Tensor, data: tuple[Tensor, ...], inputs: Inputs, entries: Entries) -> Layer:
    """A weight that is broadcast over activations; not counted as covered by a rule."""
    return Layer(
        weight=weight,
        bias=None,
        matrix=(weight.numel(), 1, 1),
        data=data,
        inputs=inputs,
        output_rows=entries,
        kronecker=False,
        covered=False,
    )


def _ones(entries: Entries, output: Tensor, weight: Tensor) -> Ones:
    """What an added weight meets."""
    lead = entries(output.detach()[None]).shape[2:-1]
    return Ones(tuple(lead), weight.detach(), weight.numel())


def _repeated_entries(output: Tensor, weight: Tensor) -> Entries | None:
    """How rows come from outputs over which a weight is broadcast.

    None where it is not repeated along any axis, so that no axis can run over the examples.
    """
    offset = output.ndim - weight.ndim
    own = [offset + axis for axis, size in enumerate(weight.shape) if size != 1]
    if any(weight.shape[axis - offset] != output.shape[axis] for axis in own):
        return None
    return entries_first(output.ndim, own) if len(own) < output.ndim else None
