"""Per-example gradients of a recorded pass, group by group.

Layer matrices have them in factors. Other uses of parameters in layers are pulled back to the
parameters, use by use; what no rule covers gets them from copies of the parameters by example.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.recording.sources import Source
from kfac_laplace.curvature.recording.tape import Use
from kfac_laplace.curvature.rows.layout import Layout, unfold
from kfac_laplace.curvature.rows.per_example import Factored, Outer, joined

#: gradient rows (v, b, *lead, o) by index of the use
Rows = Mapping[int, Tensor]
#: An entry that is picked costs about as much as so many within a matrix product.
ENTRYWISE = 8


def factored_gradient(passed: ForwardPass, group: Group, rows: Rows) -> Factored | None:
    """Factored gradients of a group of layer matrices, all its uses together; None without any."""
    parts = []
    for term in passed.terms[group.name]:
        if term.use in rows:
            row_layout = passed.row_layout(term.use)
            own = row_layout.by_example(group.own_rows(rows[term.use]), passed.n, block_axis=1)
            parts.append((term.start, term.inputs.gradients(own, row_layout, passed.n)))
    return joined(parts, group.layout.matrix[0]) if parts else None


def gradient_pieces(
    passed: ForwardPass, group: Group, rows: Rows, generic: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Per-example gradients (v, m, b, o, i) of a group, m examples at a time, in order.

    Args:
        passed: the forward pass.
        group: a group of any role.
        rows: gradient rows of the recorded uses.
        generic: what `copied_gradients` gave.
    """
    if group.name in generic:
        yield generic[group.name]
    elif group.name in passed.without_rules:
        return
    elif group.role == "exact":
        yield from _exact_pieces(passed, group, rows)
    else:
        factored = factored_gradient(passed, group, rows)
        if factored is not None:
            limit = passed.budget.gradients(factored.left)
            step = at_once(len(factored.left) * group.layout.size, limit)
            for piece in factored.pieces(step):
                yield piece.dense()


def block_gradients(
    passed: ForwardPass, group: Group, rows: Rows, generic: Mapping[str, Tensor]
) -> Tensor | None:
    """Per-example gradients (v, n, b, o, i) of a group's block; None where there are none.

    Arguments as for `gradient_pieces`.
    """
    pieces = list(block_pieces(passed, group, rows, generic))
    return torch.cat(pieces, 1) if pieces else None


def block_pieces(
    passed: ForwardPass, group: Group, rows: Rows, generic: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """What `gradient_pieces` yields, of the entries that are in the group's block alone."""
    part = group.part
    if part is None:
        yield from gradient_pieces(passed, group, rows, generic)
        return
    few = ENTRYWISE * part.size <= group.layout.size
    if few and group.factored and group.name not in passed.without_rules:
        factored = factored_gradient(passed, group, rows)
        if isinstance(factored, Outer):
            v, _, _, t, _ = factored.left.shape
            step = at_once(v * t * part.size, passed.budget.gradients(factored.left))
            places = part.places.to(factored.left.device)
            for piece in factored.pieces(step):
                yield piece.entries(places)[:, :, None, None]
            return
    for whole in gradient_pieces(passed, group, rows, generic):
        yield part.of_whole(whole)


def copied_gradients(passed: ForwardPass, vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Per-example gradients (v, n, b, o, i) of the groups that no layer rule covers in this pass.

    Args:
        passed: the forward pass.
        vectors: v backward vectors (n, t, c).
    """
    graph = passed.example_graph
    if graph is None:
        return {}
    found = [graph.gradients(vector) for vector in vectors]
    return {
        group.name: accumulable(torch.stack([group.layout.pack(each) for each in found]))
        for group in passed.knowledge.groups
        if group.name in passed.without_rules and group.name in found[0]
    }


def flat_gradients(
    passed: ForwardPass, layout: Layout, known: tuple[Rows, Mapping[str, Tensor]]
) -> Tensor | None:
    """Per-example gradients (v, n, p) of some entries, whatever groups their parameters are in.

    Entries that the outputs do not depend on have zeros; None where they depend on none.

    Args:
        passed: the forward pass.
        layout: the parameters of some groups and their entries, in the order that is wanted.
        known: gradient rows of the recorded uses, and what `copied_gradients` gave.
    """
    found: dict[str, Tensor] = {}
    for group in passed.knowledge.groups:
        if group.name not in layout.params:
            continue
        own = block_gradients(passed, group, *known)
        if own is not None:
            found |= group.block_layout.by_entry(own)
    if not found:
        return None
    some = next(iter(found.values()))
    return torch.cat(
        [
            found[name] if name in found else some.new_zeros(*some.shape[:2], each.count)
            for name, each in zip(layout.params, layout.entries, strict=True)
        ],
        -1,
    )


def _exact_pieces(passed: ForwardPass, group: Group, rows: Rows) -> Iterator[Tensor]:
    """Per-example gradients (v, m, b, o, i) of a group of role "exact", likewise.

    They are sums over its uses, each pulled back to the parameters that it is made of.
    """
    uses = [u for u in passed.uses[group.name] if u in rows]
    if not uses:
        return
    vectors = len(rows[uses[0]])
    size = sum(passed.recording.uses[u].layer.weight.numel() for u in uses)
    limit = passed.budget.gradients(rows[uses[0]])
    step = at_once(vectors * max(size, group.layout.size), limit)
    factored = [_use_gradient(passed, u, rows[u]).pieces(step) for u in uses]
    for pieces in zip(*factored, strict=True):
        m = pieces[0].left.shape[2]
        total = {
            name: pieces[0].left.new_zeros(vectors, m, *shape)
            for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
        }
        for u, piece in zip(uses, pieces, strict=True):
            _pull_back(passed, passed.recording.uses[u], piece, total)
        yield group.layout.pack(total)


def _use_gradient(passed: ForwardPass, u: int, rows: Tensor) -> Factored:
    """Factored per-example gradients with respect to the weight of a use."""
    row_layout = passed.row_layout(u)
    left = row_layout.by_example(rows, passed.n, block_axis=1)
    return passed.recording.uses[u].layer.inputs.gradients(left, row_layout, passed.n)


def _pull_back(passed: ForwardPass, use: Use, piece: Factored, total: Mapping[str, Tensor]) -> None:
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


def _add(
    passed: ForwardPass, source: Source, gradients: Tensor, total: Mapping[str, Tensor]
) -> None:
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
