"""Sums over one batch, a class for each kind of block, fed with gradient rows vector by vector."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.curvature.factors import Block, DenseBlock, DiagonalBlock, KroneckerBlock
from kfac_laplace.curvature.groups import Group
from kfac_laplace.curvature.layout import Layout
from kfac_laplace.curvature.network import Pass
from kfac_laplace.curvature.precision import accumulable, gram
from kfac_laplace.curvature.sharing import Setting

#: Of the squared gradient rows, so much is left by rounding where they cancel.
CANCELLED = 1e-9


class BatchSum(ABC):
    """The block of one batch in the making."""

    @abstractmethod
    def add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Add the contribution of some backward vectors.

        Args:
            rows: gradient rows (v, b, *lead, o) of the recorded uses.
            generic: per-example gradients (v, n, b, o, i) of the groups without a layer rule.
        """

    @abstractmethod
    def block(self) -> Block:
        """The finished block."""


class KroneckerSum(BatchSum):
    """A once from the input rows, B vector by vector; several uses are more shared positions."""

    def __init__(self, group: Group, passed: Pass, setting: Setting):
        self._group, self._passed, self._setting = group, passed, setting
        self._uses = [u for u, _ in passed.terms[group.name]]
        b, o, i = group.layout.matrix
        device = passed.network.device
        self._input_sum = torch.zeros(b, i, i, device=device)
        self._output_sum = torch.zeros(b, o, o, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._before_summing = torch.zeros((), device=device)
        if self._uses:
            self._add_inputs(group)

    def _add_inputs(self, group: Group) -> None:
        terms = self._passed.terms[group.name]
        total = sum(inputs.count for _, inputs in terms)
        if self._setting == "expand":
            for u, inputs in terms:
                self._passed.grouping(u)  # rows that sum over examples are no rows
                self._input_sum = self._input_sum + inputs.gram()
            self._count += total
            return
        n = self._passed.n
        parts = [inputs.example_sums(self._passed.grouping(u), n) for u, inputs in terms]
        means = torch.stack(parts).sum(0) * (n / total)  # (b, n, i)
        self._input_sum = gram(means)
        self._count += n

    def add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Add Σ b bᵀ over rows (expand) or over their sums by example (reduce)."""
        own = {u: self._group.own_rows(rows[u]) for u in self._uses if u in rows}
        if self._setting == "expand":
            for part in own.values():
                self._add_outputs(part)
        elif own:
            passed = self._passed
            parts = [
                passed.grouping(u).by_example(part, passed.n, block_axis=1).sum(3)
                for u, part in own.items()
            ]
            self._add_outputs(torch.stack(parts).sum(0))  # (v, b, n, o)
            for part in own.values():
                self._before_summing = self._before_summing + part.square().sum()

    def _add_outputs(self, rows: Tensor) -> None:
        """Add the Gram matrix of rows (v, b, ..., o)."""
        rows = rows.movedim(1, 0).flatten(1, -2)  # (b, v ..., o)
        self._output_sum = self._output_sum + gram(rows)

    def cancels(self) -> bool:
        """Whether the gradients of each example cancel over its positions, which leaves B = 0.

        Attention keys do so: softmax does not see a shift of all keys by one vector.
        """
        left = self._output_sum.diagonal(dim1=-2, dim2=-1).sum()
        return bool(left < CANCELLED * self._before_summing)

    def block(self) -> KroneckerBlock:
        """Sums and count."""
        return KroneckerBlock(self._group.layout, self._input_sum, self._count, self._output_sum)


class DiagonalSum(BatchSum):
    """Σ_v Σ_n (per-example gradient)², exact."""

    def __init__(self, group: Group, passed: Pass):
        self._group, self._passed = group, passed
        like = accumulable(passed.params[group.layout.params[0]].detach())
        self._values = like.new_zeros(group.layout.matrix)

    def add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Square the per-example gradients; without sharing, square the two sides instead."""
        if self._group.name in generic:
            self._values += generic[self._group.name].square().sum((0, 1))
            return
        outer = self._passed.outer(self._group, rows)
        if outer is None:
            return
        if outer.right.shape[2] == 1:
            left, right = outer.left[..., 0, :].square(), outer.right[..., 0, :].square()
            self._values += torch.einsum("vbno,bni->boi", left, right)
            return
        for gradients in outer.dense_chunks():
            self._values += gradients.square().sum((0, 1))

    def block(self) -> DiagonalBlock:
        """The diagonal."""
        return DiagonalBlock(self._group.layout, self._values)


class DenseSum(BatchSum):
    """Σ_v Σ_n g gᵀ over all groups together, exact."""

    def __init__(self, groups: Sequence[Group], layout: Layout, passed: Pass):
        self._groups, self._layout, self._passed = groups, layout, passed
        like = accumulable(passed.params[layout.params[0]].detach())
        self._matrix = like.new_zeros(layout.size, layout.size)

    def add(self, rows: Mapping[int, Tensor], generic: Mapping[str, Tensor]) -> None:
        """Add the outer products of whole gradients."""
        gradients = self._passed.gradients(self._groups, rows, generic)
        if gradients:
            flat = flat_gradients(gradients, self._layout).flatten(0, 1)  # (v n, p)
            self._matrix = self._matrix + gram(flat)

    def block(self) -> DenseBlock:
        """The matrix."""
        return DenseBlock(self._layout, self._matrix)


def flat_gradients(gradients: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Gradients (v, n, p) in parameter order, zero for parameters that are missing.

    Args:
        gradients: parameter name to (v, n, *shape); at least one.
        layout: names and shapes of all p entries.
    """
    some = next(iter(gradients.values()))
    lead = some.shape[:2]
    parts = [
        gradients[name].reshape(*lead, -1)
        if name in gradients
        else some.new_zeros(*lead, shape.numel())
        for name, shape in zip(layout.params, layout.shapes, strict=True)
    ]
    return torch.cat(parts, -1)
