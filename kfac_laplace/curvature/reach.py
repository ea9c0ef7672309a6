"""Which rows of a layer the outputs depend on at all.

Padding, and tokens that nothing reads, receive no gradient and must not enter input factors. Rows
behind a rectifier that happens to be off receive none either, but are ordinary positions: their
input belongs to the average. A backward pass in which rectifiers let everything through tells the
two apart.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfac_laplace.curvature.tape import Recording

#: Autograd nodes of functions that are flat on half of their inputs or more.
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
)


def reachable_rows(recording: Recording, outputs: Tensor, counted: Tensor | None) -> list[Tensor]:
    """For each recorded use a mask over the leading axes of its rows: those that outputs see.

    Args:
        recording: the forward pass.
        outputs: f (n, t, c) in its graph.
        counted: weights of the outputs in the loss, broadcastable to (n, t, c), where zeros do not
            count; None if all do.
    """
    # Irregular weights: equal ones could cancel in a softmax or a normalisation.
    weights = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype, device=outputs.device)
    vector = (weights % 97 + 1).sqrt().reshape(outputs.shape)
    if counted is not None:
        vector = vector * (counted != 0)
    with _open_gates(outputs):
        found = recording.output_rows(outputs, [vector])
    return [
        torch.zeros(use.layer.inputs.lead, dtype=torch.bool, device=outputs.device)
        if rows is None
        else (rows[0] != 0).any(-1).any(0)
        for use, rows in zip(recording.uses, found, strict=True)
    ]


@contextmanager
def _open_gates(outputs: Tensor) -> Iterator[None]:
    """Let gradients through rectifiers unchanged while active."""
    handles = [
        node.register_hook(_let_through)
        for node in _nodes(outputs.grad_fn)
        if node.name().startswith(GATES)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _let_through(
    grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradient of a gate's output as that of its input."""
    return (grad_outputs[0], *grad_inputs[1:])


def _nodes(root: Node | None) -> Iterator[Node]:
    """All nodes of a graph."""
    seen: set[Node] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(below for below, _ in node.next_functions if below is not None)
