"""The bottleneck cut: below a head f = W h + b only Wᵀ Λ W matters, which is d×d for h ∈ R^d.

With more outputs than d, its d root vectors are backpropagated from h instead of the C − 1 roots of
Λ from f; both give the same blocks. The head itself needs no backward pass: its B is Σ_n D Λ_n D.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from kfac_laplace.curvature.estimate.accumulators import Accumulator
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.kronecker_accumulator import KroneckerAccumulator
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import SumDtype, accumulable
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.model.tensors import has_values
from kfac_laplace.likelihoods import Likelihood

#: Matrix products by autograd node, and which of their operands is h (n, d).
PRODUCTS = {"AddmmBackward0": 1, "MmBackward0": 0}


@dataclass(frozen=True)
class Cut:
    """Where a pass is cut, between a head and what is below it.

    Args:
        passed: the forward pass.
        head: names of the head's groups.
        below: the uses whose gradient rows are wanted below the head.
        h: gradient edge of the head's input (n, d), or None where nothing is wanted below.
        weight: Wᵀ (d, c), or None likewise.
        dtype: the precision of products and sums.
    """

    passed: ForwardPass
    head: frozenset[str]
    below: tuple[int, ...]
    h: GradientEdge | None
    weight: Tensor | None
    dtype: SumDtype

    def roots(self) -> Iterator[Tensor]:
        """Vectors v (n, d) with Σ v vᵀ = Wᵀ D Λ_n D W for each example, from its eigenvalues."""
        if self.weight is None:
            return
        weight = self.dtype.summable(self.weight.detach())
        likelihood, pieces = self.passed.likelihood, self._pieces(weight.numel())
        pulled_back = torch.cat(
            [_pulled_back(likelihood, *piece, weight) for piece in pieces]
        )  # (n, d, d)
        values, vectors = torch.linalg.eigh(pulled_back)
        # Eigenvalues up to the matrix's own rounding errors are zeros: its rank may be below d.
        noise = values[:, -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
        scaled = vectors * values.where(values > noise, 0).sqrt()[:, None]
        if has_values(values):
            used = (values > noise).any(0)
            used[-1] = True  # sums take their dtype from a vector
        else:
            used = torch.ones(values.shape[-1], dtype=torch.bool, device="cpu")
        for k in used.nonzero()[:, 0].flip(0):
            yield scaled[..., k].to(self.weight.dtype)

    def with_head(self, made: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
        """The sums of a batch, with those of the head's groups finished."""
        if not self.head:
            return dict(made)
        outputs = self._head_factor()
        found = dict(made)
        for name in self.head:
            inner = made[name]
            assert isinstance(inner, KroneckerAccumulator)
            found[name] = HeadAccumulator(inner, outputs)
        return found

    def _head_factor(self) -> Tensor:
        """Σ_n D Λ_n D, shape (c, c)."""
        likelihood, importance = self.passed.likelihood, self.passed.weights
        f = self.dtype.summable(self.passed.outputs.detach())
        p = likelihood.softmax_probabilities(f[:, 0])
        if p is None:
            total = f.new_zeros(f.shape[-1], f.shape[-1])
            for piece in self._pieces(total.numel()):
                total += _hessian(likelihood, *piece).sum(0)
            return total
        weighted = p if importance is None else p * importance[:, 0].to(p)
        products = (weighted.mT @ p).fill_diagonal_(0)
        # Rows of Λ sum to zero. So found, the diagonal keeps the digits that p − p² loses.
        return products.sum(-1).diag() - products

    def _pieces(self, entries: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Outputs (m, 1, c) and weights of a few examples, by the entries that each needs."""
        importance = self.passed.weights
        f = self.dtype.summable(self.passed.outputs.detach())
        step = at_once(entries, self.passed.budget.hessians(f))
        parts = [None] * len(f) if importance is None else importance.split(step)
        yield from zip(f.split(step), parts, strict=False)


class HeadAccumulator(Accumulator):
    """The block of a head, whose B is known without gradient rows."""

    def __init__(self, inner: KroneckerAccumulator, output_sum: Tensor):
        self._inner, self._output_sum = inner, output_sum

    def receive(self, use: int, rows: Tensor) -> None:
        """No rows are wanted."""

    def finish_vector(self, generic: Mapping[str, Tensor]) -> None:
        """Nothing to add."""

    def block(self) -> Block:
        """A from the inputs as always, and B."""
        return self._inner.block().with_outputs(self._output_sum[None])


def find_cut(passed: ForwardPass, dtype: SumDtype) -> Cut | None:
    """The cut of a pass whose output is the product of one linear layer, where it saves passes.

    The layer may be frozen. If it is not, its parameters are used nowhere else, have Kronecker
    factors, and all else that the output depends on is below h.
    """
    groups = passed.knowledge.groups
    output, node = passed.recording.output, passed.recording.output.grad_fn
    if node is None or node.name() not in PRODUCTS or output.device.type == "mps":
        return None
    f = passed.outputs.detach()
    if f.shape[:2] != (passed.n, 1) or not _same(f[:, 0], accumulable(output.detach())):
        return None
    use = next((u for u, use in enumerate(passed.recording.uses) if use.edge.node is node), None)
    head = [group for group in groups if use in passed.uses[group.name]]
    if (
        any(group.name in passed.without_rules for group in groups)
        or getattr(node, "_saved_alpha", 1) != 1
    ):
        return None
    if not (_is_alone(node) if use is None else _is_plain(passed, node, use, head)):
        return None
    names = frozenset(group.name for group in head)
    below = tuple(sorted({u for group in groups for u in passed.uses[group.name]} - {use}))
    if not below:
        return Cut(passed, names, below, None, None, dtype)
    weight: Tensor = node._saved_mat2  # type: ignore[attr-defined]
    if output.shape[1] - 1 <= len(weight):
        return None
    h, index = node.next_functions[PRODUCTS[node.name()]]
    assert h is not None
    return Cut(passed, names, below, GradientEdge(h, index), weight, dtype)


def _is_alone(node: Node) -> bool:
    """Whether the output of a frozen head depends on its input h alone."""
    reached = [fn is not None for fn, _ in node.next_functions]
    return reached[PRODUCTS[node.name()]] and sum(reached) == 1


def _is_plain(passed: ForwardPass, node: Node, use: int, head: Sequence[Group]) -> bool:
    """Whether the output reaches the head's groups by this product alone, and all else by h."""
    below, _ = node.next_functions[PRODUCTS[node.name()]]
    recorded, output = passed.recording.uses[use], passed.recording.output.detach()
    rows = recorded.layer.output_rows(output[None])
    return (
        recorded.below == (() if below is None else (below,))
        and all(group.factored and group.treatment == "kron" for group in head)
        and all(passed.uses[group.name] == [use] for group in head)
        and all(group.layout.matrix[0] == 1 for group in head)
        and rows.shape == (1, 1, *output.shape)
        and _same(rows[0, 0], output)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or of one shape where they have no values."""
    if one.shape != other.shape or not has_values(one):
        return one.shape == other.shape
    return _in_one_place(one, other) or torch.equal(one, other)


def _in_one_place(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same memory, as a device need not be asked."""
    if not all(map(torch._C._has_storage, (one, other))):  # sparse ones, and those of torch.func
        return False
    places = (
        (
            t.untyped_storage()._cdata,
            t.storage_offset(),
            t.stride(),
            t.dtype,
            t.is_neg(),
            t.is_conj(),
        )
        for t in (one, other)
    )
    return next(places) == next(places)


def _pulled_back(
    likelihood: Likelihood, f: Tensor, importance: Tensor | None, weight: Tensor
) -> Tensor:
    """Wᵀ D Λ D W of each example, shape (m, d, d), for `weight` Wᵀ (d, c) and outputs f alike."""
    p = likelihood.softmax_probabilities(f[:, 0])
    if p is None:
        return weight @ _hessian(likelihood, f, importance) @ weight.mT
    # Σ_j p_j (W_j − w̄)(W_j − w̄)ᵀ, measured from the most probable class: where p is nearly
    # one-hot, W_j − w̄ would otherwise be lost in rounding.
    apart = weight.mT - weight.mT[p.argmax(-1)][:, None]  # (m, c, d)
    apart -= p[:, None] @ apart
    scale = p if importance is None else p * importance[:, 0].to(p)
    apart *= scale.sqrt()[..., None]
    return apart.mT @ apart


def _hessian(likelihood: Likelihood, f: Tensor, importance: Tensor | None) -> Tensor:
    """D Λ D of each example, shape (m, c, c)."""
    hessian = likelihood.hessian(f)[:, 0]
    if importance is None:
        return hessian
    d = importance[:, 0].to(hessian).sqrt()
    return d[:, :, None] * hessian * d[:, None, :]
