"""Which rows of a layer the outputs depend on at all.

Padding, and tokens that nothing reads, receive no gradient and must not enter input factors. Rows
behind a rectifier that happens to be off, or that win no maximum, receive none either, but are
ordinary positions: their input belongs to the average. A row counts if the outputs would depend on
it at some other values of the rows. A backward pass in which the usual rectifiers and maxima let
everything through finds most of these at once; `moved_rows` finds those that are spelled otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

from kfac_laplace.curvature.recording.autograd_graph import all_nodes
from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.recording.tape import Recording

Gradients = Sequence[Tensor | None]


def _let_through(grad_inputs: Gradients, grad_outputs: Gradients) -> tuple[Tensor | None, ...]:
    """The gradient of an elementwise function's output as that of its inputs."""
    given = grad_outputs[0]
    return tuple(
        wanted if wanted is None or given is None or wanted.shape != given.shape else given
        for wanted in grad_inputs
    )


def _spread(node: Any, grad_inputs: Gradients, grad_outputs: Gradients) -> tuple[Tensor | None]:
    """The gradient of a maximum along axes to all entries that took part."""
    wanted, given = grad_inputs[0], grad_outputs[0]
    if wanted is None or given is None:
        return (wanted,)
    dims = node._saved_dim if isinstance(node._saved_dim, tuple) else (node._saved_dim,)
    if not node._saved_keepdim:
        # Negative axes are stored unsigned.
        for dim in sorted((dim - 2**64 if dim >= 2**63 else dim) % wanted.ndim for dim in dims):
            given = given.unsqueeze(dim)
    return (given.expand_as(wanted),)


def _spread_pool(grad_inputs: Gradients, grad_outputs: Gradients) -> tuple[Tensor | None]:
    """The gradient of a maximum over windows to the places around each."""
    wanted, given = grad_inputs[0], grad_outputs[0]
    if wanted is None or given is None or given.ndim < 4:  # without a batch axis
        return (wanted,)
    return (F.interpolate(given, wanted.shape[2:]),)


#: Smallest gradient that counts, in any precision.
SMALLEST = torch.finfo(torch.float32).tiny
#: Autograd nodes of elementwise functions that are flat on half of their inputs or more.
GATES = (
    "ReluBackward",
    "HardtanhBackward",
    "ThresholdBackward",
    "HardsigmoidBackward",
    "HardswishBackward",
    "ClampBackward",
    "ClampMinBackward",
    "SoftshrinkBackward",
    "HardshrinkBackward",
    "PowBackward",  # as in squared rectifiers, flat where these are off
    "MaximumBackward",
    "MinimumBackward",
)
#: Autograd nodes of maxima along axes.
MAXIMA = ("AmaxBackward", "AminBackward", "MaxBackward0", "MinBackward0")
#: Autograd nodes of maxima over windows.
POOLS = (
    "MaxPool2DWithIndicesBackward",
    "MaxPool3DWithIndicesBackward",
    "AdaptiveMaxPool2DBackward",
    "AdaptiveMaxPool3DBackward",
)


def reachable_rows(recording: Recording, outputs: Tensor, vector: Tensor) -> list[Tensor]:
    """For each recorded use a mask over the leading axes of its rows: those that outputs see.

    Args:
        recording: the forward pass.
        outputs: f (n, t, c) in its graph.
        vector: what is backpropagated, shaped like them.
    """
    with _open_gates(outputs):
        return rows_reached(recording, outputs, vector)


def rows_reached(recording: Recording, outputs: Tensor, vector: Tensor) -> list[Tensor]:
    """Where the gradients of a vector are not zero; arguments as for `reachable_rows`."""
    reached = [
        torch.zeros(use.layer.inputs.lead, dtype=torch.bool, device=outputs.device)
        for use in recording.uses
    ]

    def receive(u: int, rows: Tensor) -> None:
        reached[u] = is_nonzero(rows[0]).any(-1).any(0)

    Backward(recording, outputs, range(len(recording.uses)))(vector, receive)
    return reached


def irregular(outputs: Tensor, counted: Tensor | None) -> Tensor:
    """A backward vector for outputs (n, t, c) that sees all of them that count.

    Args:
        outputs: gives shape, dtype and device.
        counted: weights of the outputs in the loss, broadcastable to (n, t, c), where zeros do not
            count; None if all do.
    """
    # Irregular weights: equal ones could cancel in a softmax or a normalisation.
    weights = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    vector = (weights % 97 + 1).sqrt().reshape(outputs.shape)
    return vector if counted is None else vector * (counted != 0)


def is_nonzero(rows: Tensor) -> Tensor:
    """Which entries count as not zero: those that float32 holds, so that precision does not matter.

    What overflowed or is no number says nothing.
    """
    size = rows.abs()
    return (size >= SMALLEST) & (size < torch.inf)


@contextmanager
def _open_gates(outputs: Tensor) -> Iterator[None]:
    """Let gradients through rectifiers and maxima to all their inputs while active."""
    hooks = {node: hook for node in all_nodes(outputs.grad_fn) if (hook := _hook(node)) is not None}
    handles = [node.register_hook(hook) for node, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(node: Node) -> Callable[..., Any] | None:
    """What opens a node, or None for one that is no gate."""
    if node.name().startswith(GATES):
        return _let_through
    if node.name().startswith(POOLS):
        return _spread_pool
    return partial(_spread, node) if node.name().startswith(MAXIMA) else None
