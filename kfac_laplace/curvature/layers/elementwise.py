"""Parameters that scale or shift: their per-example gradients come straight from the output's.

Each entry is a block of its own, (p, 1, 1): its gradient is Σ_t g_t x_t over the axes along which
the entry is repeated. They get an exact diagonal block, without a pass through the whole model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.registry import Layer, Ones, Rows, layer_rule


@layer_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Layer | None:
    """Scale and shift of the normalised input, repeated over all leading axes."""
    axes = len(normalized_shape)
    if weight is None or input.ndim <= axes:
        return None
    entries = _entries_first(output.ndim, range(output.ndim - axes, output.ndim))
    normalised = F.layer_norm(input.detach(), normalized_shape, eps=eps)
    return Layer(
        weight=weight,
        bias=bias,
        matrix=(weight.numel(), 1, 1),
        data=(input,),
        inputs=Rows(entries(normalised[None])[0]),
        output_rows=entries,
        kronecker=False,
    )


@layer_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(output: Tensor, input: Tensor, other: Tensor, **options: object) -> Layer | None:
    """A parameter added to an activation, as position embeddings are."""
    parts = _parameter_and_data(output, input, other)
    if parts is None or options:
        return None
    parameter, data, entries = parts
    lead = entries(output.detach()[None]).shape[2:-1]
    return Layer(
        weight=parameter,
        bias=None,
        matrix=(parameter.numel(), 1, 1),
        data=(data,),
        inputs=Ones(tuple(lead), parameter.detach(), parameter.numel()),
        output_rows=entries,
        kronecker=False,
    )


@layer_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def mul(output: Tensor, input: Tensor, other: Tensor, **options: object) -> Layer | None:
    """A parameter that multiplies an activation, as layer scales and gates are."""
    parts = _parameter_and_data(output, input, other)
    if parts is None or options:
        return None
    parameter, data, entries = parts
    return Layer(
        weight=parameter,
        bias=None,
        matrix=(parameter.numel(), 1, 1),
        data=(data,),
        inputs=Rows(entries(data.detach().expand_as(output)[None])[0]),
        output_rows=entries,
        kronecker=False,
    )


Entries = Callable[[Tensor], Tensor]


def _parameter_and_data(
    output: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Entries] | None:
    """The one operand that is a leaf with gradients, the other, and how rows come from outputs.

    None where that is not one of each, or where the parameter is not repeated along any axis, so
    that no axis can run over the examples.
    """
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if _is_parameter(left) == _is_parameter(right):
        return None
    parameter, data = (left, right) if _is_parameter(left) else (right, left)
    offset = output.ndim - parameter.ndim
    own = [offset + axis for axis, size in enumerate(parameter.shape) if size != 1]
    if any(parameter.shape[axis - offset] != output.shape[axis] for axis in own):
        return None
    if len(own) == output.ndim:
        return None
    return parameter, data, _entries_first(output.ndim, own)


def _is_parameter(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def _entries_first(ndim: int, own: "range | list[int]") -> Entries:
    """Take outputs (v, *shape) to rows (v, p, *lead, 1), where axes `own` run over the entries."""
    lead = [axis for axis in range(ndim) if axis not in own]

    def entries(tensor: Tensor) -> Tensor:
        moved = tensor.permute(0, *(1 + axis for axis in own), *(1 + axis for axis in lead))
        shape = [tensor.shape[1 + axis] for axis in lead]
        return moved.reshape(tensor.shape[0], -1, *shape, 1)

    return entries
