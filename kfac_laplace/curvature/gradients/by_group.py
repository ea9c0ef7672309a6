"""Gradients of parameters that layers use in ways without Kronecker factors, use by use."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.recording.sources import Source
from kfac_laplace.curvature.recording.tape import Use
from kfac_laplace.curvature.rows.layout import unfold
from kfac_laplace.curvature.rows.per_example import Factored

if TYPE_CHECKING:
    from kfac_laplace.curvature.gradients.forward_pass import Pass


def exact_pieces(passed: "Pass", group: Group, rows: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """Per-example gradients (v, m, b, o, i) of an exact group, m examples at a time, in order.

    They are sums over its uses, each pulled back to the parameters that it is made of.

    Args:
        passed: the forward pass.
        group: a group of role "exact".
        rows: gradient rows (v, b, *lead, o) of the recorded uses.
    """
    uses = [u for u in passed.uses[group.name] if u in rows]
    if not uses:
        return
    vectors = len(rows[uses[0]])
    size = sum(passed.recording.uses[u].layer.weight.numel() for u in uses)
    limit = passed.budget.gradients(rows[uses[0]])
    step = at_once(vectors * max(size, group.layout.size), limit)
    gradients = [_use_gradient(passed, u, rows[u]).pieces(step) for u in uses]
    for pieces in zip(*gradients, strict=True):
        m = pieces[0].left.shape[2]
        total = {
            name: pieces[0].left.new_zeros(vectors, m, *shape)
            for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
        }
        for u, piece in zip(uses, pieces, strict=True):
            _pull_back(passed, passed.recording.uses[u], piece, total)
        yield group.layout.pack(total)


def _use_gradient(passed: "Pass", u: int, rows: Tensor) -> Factored:
    """Factored per-example gradients with respect to the weight of a use."""
    row_layout = passed.row_layout(u)
    left = row_layout.by_example(rows, passed.n, block_axis=1)
    return passed.recording.uses[u].layer.inputs.gradients(left, row_layout, passed.n)


def _pull_back(passed: "Pass", use: Use, piece: Factored, total: Mapping[str, Tensor]) -> None:
    """Add the gradients of a use to those of the parameters in `total`."""
    layer = use.layer
    v, m = piece.left.shape[0], piece.left.shape[2]
    if use.weight is not None and total.keys() & set(use.weight.params):
        chain = (layer.fold,) if layer.fold is not None else ()
        dense = unfold(piece.dense().flatten(2), chain, 2)
        _add(passed, use.weight, dense.reshape(v, m, *layer.weight.shape), total)
    if use.bias is not None and total.keys() & set(use.bias.params):
        assert layer.bias is not None
        sums = piece.left.sum(3).movedim(1, 2)  # (v, m, b, o)
        _add(passed, use.bias, sums.reshape(v, m, *layer.bias.shape), total)


def _add(passed: "Pass", source: Source, gradients: Tensor, total: Mapping[str, Tensor]) -> None:
    """Take gradients (v, m, *shape) of a source to its parameters."""
    if source.is_parameter:
        total[source.params[0]].add_(gradients)
        return
    names = [name for name in source.params if name in total]
    found = torch.autograd.grad(
        source.edge,
        [passed.params[name] for name in names],
        gradients.flatten(0, 1).to(source.tensor.dtype),
        is_grads_batched=True,
        retain_graph=True,
        allow_unused=True,
    )
    for name, grad in zip(names, found, strict=True):
        if grad is not None:
            total[name].add_(grad.unflatten(0, gradients.shape[:2]))
