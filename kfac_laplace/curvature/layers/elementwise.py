"""Parameters that scale or shift: their per-example gradients come straight from the output's.

Each entry is a block of its own, (p, 1, 1): its gradient is Σ_t g_t x_t over the axes along which
the entry is repeated. They get an exact diagonal block, without a pass through the whole model.
"""

import torch
from torch import Tensor

from kfac_laplace.curvature.layers.entries import Entries, entries_first
from kfac_laplace.curvature.layers.registry import Layer, Ones, Rows, operator_rule


@operator_rule(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def add(
    output: Tensor, weight: Tensor, input: Tensor, other: Tensor, **options: object
) -> Layer | None:
    """A parameter added to an activation, as position embeddings are."""
    entries = _repeated_entries(output, weight)
    data = other if input is weight else input
    if entries is None or options:
        return None
    lead = entries(output.detach()[None]).shape[2:-1]
    return Layer(
        weight=weight,
        bias=None,
        matrix=(weight.numel(), 1, 1),
        data=(data,) if isinstance(data, Tensor) else (),
        inputs=Ones(tuple(lead), weight.detach(), weight.numel()),
        output_rows=entries,
        kronecker=False,
        covered=False,
    )


@operator_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(
    output: Tensor, weight: Tensor, input: Tensor, other: Tensor, **options: object
) -> Layer | None:
    """A parameter that multiplies an activation, as layer scales and gates are."""
    entries = _repeated_entries(output, weight)
    data = other if input is weight else input
    if entries is None or options:
        return None
    return Layer(
        weight=weight,
        bias=None,
        matrix=(weight.numel(), 1, 1),
        data=(data,),
        inputs=Rows(entries(data.detach().expand_as(output)[None])[0]),
        output_rows=entries,
        kronecker=False,
        covered=False,
    )


#: Calls that repeat a tensor; what they repeat over the examples is used by each of them.
REPEATS = {
    Tensor.expand,
    Tensor.expand_as,
    Tensor.repeat,
    Tensor.tile,
    torch.tile,
    torch.broadcast_to,
    Tensor.broadcast_to,
}


@operator_rule(Tensor.expand_as)
def expand_as(output: Tensor, weight: Tensor, input: Tensor, other: Tensor) -> Layer | None:
    """A parameter repeated as often as there are examples in `other`."""
    return repeated(output, weight, len(output)) if input is weight else None


def repeated(output: Tensor, weight: Tensor, n: int) -> Layer | None:
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
    lead = entries(output.detach()[None]).shape[2:-1]
    return Layer(
        weight=weight,
        bias=None,
        matrix=(weight.numel(), 1, 1),
        data=(),
        inputs=Ones(tuple(lead), weight.detach(), weight.numel()),
        output_rows=entries,
        kronecker=False,
        covered=False,
    )


def _repeated_entries(output: Tensor, weight: Tensor) -> Entries | None:
    """How rows come from outputs over which a weight is broadcast.

    None where it is not repeated along any axis, so that no axis can run over the examples.
    """
    offset = output.ndim - weight.ndim
    own = [offset + axis for axis, size in enumerate(weight.shape) if size != 1]
    if any(weight.shape[axis - offset] != output.shape[axis] for axis in own):
        return None
    return entries_first(output.ndim, own) if len(own) < output.ndim else None
