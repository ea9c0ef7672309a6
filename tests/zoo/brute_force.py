"""K-FAC by brute force and the exact GGN: the formulas over the rows that hooks have seen.

Nothing here comes from the library. Index letters as in `zoo.hooks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import oracles
import torch
from torch import Tensor
from zoo.case import N_DATA, ZooCase
from zoo.hooks import Hooks
from zoo.layers import Lookup


class Oracle:
    """K-FAC blocks, exact GGN blocks and gradients of a case."""

    def __init__(self, case: ZooCase):
        self.case = case
        self.seen = Hooks(case)

    def kfac(self, names: Sequence[str], setting: str) -> Tensor:
        """B (x) A (p, p) of a weight, a weight with its bias behind it, or a bias alone.

        Rows that receive no gradient from any loss term are left out of A in layers that share
        their weight over an example's rows; patches of convolutions all count.
        """
        if self.is_bias(names[0]):
            return torch.block_diag(
                *[self._bias(part, setting) for part in self.seen.places[names[0]]]
            )
        blocks, orders, start = [], [], 0
        for part in self.seen.places[names[0]]:
            a, b = self._factors(part, len(names) == 2, setting)  # (g, i, i), (g, o, o)
            blocks.append(oracles.kfac_block(oracles.Factors(a, b)))
            entries = start + torch.arange(len(blocks[-1]))
            start += len(entries)
            orders.append(self._order(part, entries.view(len(a), b.shape[1], -1), len(names) == 2))
        order = torch.cat([torch.cat(kind) for kind in zip(*orders, strict=True)])
        return torch.block_diag(*blocks)[order][:, order]

    def is_bias(self, name: str) -> bool:
        """Whether a parameter is the bias of a layer."""
        return self.seen.places[name][0] in self.seen.biases

    def _order(self, part: str, entries: Tensor, joint: bool) -> list[Tensor]:
        """Entries (g, o, i) in the order of the weight, and those of the bias column."""
        kind = self.seen.uses[part][0][0].kind
        weight = kind.weight_order(entries[..., :-1] if joint else entries).flatten()
        return [weight, entries[..., -1].flatten()] if joint else [weight]

    def _bias(self, part: str, setting: str) -> Tensor:
        """B (o, o) of one bias of the twin: over its rows, or over their sums by example."""
        a, b, owner = self.seen.all_rows(part)
        if setting == "reduce":
            _, b, owner = _by_example(a, b, owner)
        return self._output_factor(b.flatten(3)[..., None, :], owner)[0]

    def _factors(self, part: str, joint: bool, setting: str) -> tuple[Tensor, Tensor]:
        """A (g, i, i) and B (g, o, o) of one weight of the twin, over all its calls."""
        a, b, owner = self.seen.all_rows(part)
        kind = self.seen.uses[part][0][0].kind
        if joint:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        if kind.shared and len(owner) > N_DATA:
            live = self._live(b, owner)
            a, b, owner = a[live], b[:, :, live], owner[live]
        if setting == "reduce":
            a, b, owner = _by_example(a, b, owner)
        input_factor = torch.einsum("rgi,rgj->gij", a, a) / len(a)
        if isinstance(kind, Lookup):  # no V x V matrix: entries do not mix
            input_factor = torch.diag_embed(input_factor.diagonal(dim1=1, dim2=2))
        return input_factor, self._output_factor(b, owner)

    def _output_factor(self, b: Tensor, owner: Tensor) -> Tensor:
        """Sum over rows of b Lambda b^T, (g, o, o)."""
        hessian = self.seen.terms.table[owner]  # (r, s, c, c)
        return torch.einsum("scrgo,rscd,sdrgp->gop", b, hessian, b)

    def _live(self, b: Tensor, owner: Tensor) -> Tensor:
        """Rows that receive a gradient from some loss term, (r,)."""
        counted = self.seen.terms.table.flatten(2).any(-1)[owner].T  # (s, r)
        return ((b != 0).any(1).flatten(2).any(-1) & counted).any(0)

    def gradients(self, name: str) -> Tensor:
        """d f_m / d theta (m, c, p) of a weight as the rows make it: sums of b aT by example."""
        found = []
        for part in self.seen.places[name]:
            a, b, owner = self.seen.all_rows(part)
            own = torch.eye(N_DATA, dtype=a.dtype)[owner]  # (r, n)
            entries = torch.einsum("scrgo,rgi,rn->nscgoi", b, a, own)
            ordered = self._order(
                part, torch.arange(entries[0, 0, 0].numel()).view(entries.shape[3:]), False
            )
            found.append(entries.flatten(3)[..., ordered[0]])
        return torch.cat(found, -1)[self.seen.terms.owner, self.seen.terms.slot]

    def exact(self, names: Sequence[str]) -> Tensor:
        """The exact GGN block (p, p) of the named parameters of the model itself."""
        j = self.jacobian(names)
        return torch.einsum("mcp,mcd,mdq->pq", j, self.seen.terms.hessian, j)

    def exact_diagonal(self, names: Sequence[str]) -> Tensor:
        """The diagonal of the exact GGN block, (p,)."""
        j = self.jacobian(names)
        return torch.einsum("mcp,mcd,mdp->p", j, self.seen.terms.hessian, j)

    def jacobian(self, names: Sequence[str]) -> Tensor:
        """d f_m / d theta (m, c, p) by autograd, zero where the label is left out."""
        return torch.cat([self._jacobians[name] for name in names], -1)

    @cached_property
    def trainable(self) -> list[str]:
        """Names of the parameters with gradients, in model order."""
        return oracles.trainable(self.case.model)

    @cached_property
    def _jacobians(self) -> dict[str, Tensor]:
        output, named = self.case.forward(self.seen.x), dict(self.case.model.named_parameters())
        f = oracles.terms(output, self.seen.y, self.case.likelihood).flatten(0, 1)
        counted = self.seen.terms.hessian.flatten(1).any(1)
        sizes = [named[name].numel() for name in self.trainable]
        j = f.new_zeros(*f.shape, sum(sizes)).detach()
        j[counted] = oracles.parameter_jacobian(f[counted], self.case.model, self.trainable)
        return dict(zip(self.trainable, j.split(sizes, -1), strict=True))


def _by_example(a: Tensor, b: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows averaged (a) and summed (b) by example, of those examples that have any."""
    examples, owner = owner.unique(return_inverse=True)
    counts = torch.bincount(owner)[:, None, None]
    means = a.new_zeros(len(examples), *a.shape[1:]).index_add(0, owner, a) / counts
    sums = b.new_zeros(*b.shape[:2], len(examples), *b.shape[3:]).index_add(2, owner, b)
    return means, sums, examples
