"""The sum that makes a block of Kronecker factors."""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.accumulators import Accumulator
from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.curvature.estimate.settings import Setting, of_part
from kfac_laplace.curvature.estimate.shared_grams import SharedGrams
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group, Term
from kfac_laplace.curvature.linalg.away_sum import AwaySum
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import Gram, GramSum
from kfac_laplace.curvature.linalg.leading_gram import LeadingGram, LeadingSum, is_wide
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.inputs import Inputs

#: A sum of rows: with all of their products, beside the rows or elsewhere, or few directions.
RowSum = GramSum | LeadingSum | AwaySum


class KroneckerAccumulator(Accumulator):
    """B vector by vector, then A from the input rows; several uses are more shared positions.

    Positions on which no output depends do not enter A: padding, and tokens that nothing reads.

    Args:
        group: a group of layer matrices.
        passed: the forward pass.
        setting: expand or reduce.
        dtype: the precision of products and sums.
        widest: of an A with more columns only the diagonal is summed; None: of none.
        grams: those of other layers of the pass.
        rank: of wide factors only so many leading directions are kept; None: all are.
        home: where B lies, if not on the device of the pass.
    """

    def __init__(
        self,
        group: Group,
        passed: ForwardPass,
        setting: Setting,
        dtype: SumDtype,
        widest: int | None = None,
        grams: SharedGrams | None = None,
        rank: int | None = None,
        home: torch.device | None = None,
    ):
        self._grams = SharedGrams() if grams is None else grams
        self._rank = rank
        self._group, self._passed, self._dtype = group, passed, dtype
        width = group.layout.matrix[2]
        self._diagonal = group.diagonal or (widest is not None and width > widest)
        self._terms = passed.terms[group.name]
        self.uses = frozenset(term.use for term in self._terms)
        self._of_example: dict[int, Tensor] = {}  # of the vector at hand, by first block
        b, o, _ = group.layout.matrix
        self._device = passed.device
        blocks = b // group.layout.parts
        self._settings = {t.start: of_part(setting, t.start // blocks) for t in self._terms}
        shared = "expand" in self._settings.values() and any(map(self._shared, self._terms))
        self._outputs = self._sum(b, o, passed.outputs.detach(), dtype.of_rows(shared), home)
        for term in self._terms:
            passed.row_layout(term.use)  # rows that sum over examples are no rows
            if self._settings[term.start] == "expand" and (key := self._key(term)) is not None:
                self._grams.want(key)
            if _may_drop(term, passed.n):
                passed.seen.watch(term.use)

    def _sum(
        self, b: int, width: int, like: Tensor, dtype: SumDtype, home: torch.device | None = None
    ) -> RowSum:
        """A sum of rows so wide, at home if not where they are; arguments as for `GramSum`."""
        if self._is_wide(width):
            assert self._rank is not None
            return LeadingSum(b, width, like, dtype, self._rank)
        if home is not None:
            return AwaySum(b, width, like, dtype, home)
        return GramSum(b, width, like, dtype)

    def _is_wide(self, width: int) -> bool:
        """Whether of factors so wide only leading directions are kept."""
        return self._rank is not None and is_wide(width, self._rank)

    def foresee(self, vectors: int) -> None:
        """Multiply rows of B from the first on if so many vectors will bring many."""
        n = self._passed.n
        each = sum(
            t.inputs.count if self._settings[t.start] == "expand" else n for t in self._terms
        )
        self._outputs.foresee(vectors * each // self._group.layout.parts)

    def _shared(self, term: Term) -> bool:
        """Whether examples have several rows at a use."""
        return term.inputs.count > self._passed.n

    def _key(self, term: Term) -> Hashable | None:
        """What tells whether another layer's A is the same; None where it is not to be known."""
        key = None if self._diagonal else term.inputs.key
        return None if key is None else (key, self._dtype.of_rows(self._shared(term)))

    def receive(self, use: int, rows: Tensor) -> None:
        """Add Σ b bᵀ over rows (expand), or sum them by example (reduce)."""
        own = self._group.own_rows(rows)
        self._passed.seen.note(use, own)
        for term in self._terms:
            if term.use != use:
                continue
            if self._settings[term.start] == "expand":
                self._outputs.add(own[0], term.start)
                continue
            row_layout, n = self._passed.row_layout(use), self._passed.n
            part = row_layout.by_example(own, n, block_axis=1).sum(3)[0]  # (b, n, o)
            known = self._of_example.get(term.start)
            self._of_example[term.start] = part if known is None else known + part

    def finish_vector(self, generic: Mapping[str, Tensor]) -> None:
        """Add Σ b̂ b̂ᵀ over the sums by example, in which uses are more shared positions."""
        for start, part in self._of_example.items():
            self._outputs.add(part, start)
        self._of_example = {}

    def block(self) -> KroneckerBlock:
        """Sums and counts."""
        starts: dict[int, list[Term]] = {}
        for term in self._terms:
            starts.setdefault(term.start, []).append(term)
        b, _, i = self._group.layout.matrix
        outputs = self._outputs.gram()
        found: dict[int, Gram | Tensor] = {}
        count = torch.zeros(b, dtype=torch.float64, device=self._device)
        for start, terms in starts.items():
            sums = self._rows if self._settings[start] == "expand" else self._means
            found[start], number = sums(terms)
            blocks = b // self._group.layout.parts
            count[start : start + blocks] = number
        whole = len(found) == 1 and self._group.layout.parts == 1
        none = outputs.packed.new_zeros(b, i, device=self._device)
        inputs = found[0] if whole else self._beside(found, none)
        layout = self._group.layout
        if self._rank is not None:
            return LeadingBlock.of(layout, inputs, count, outputs, self._rank)
        return KroneckerBlock.of(layout, inputs, count, outputs)

    def _beside(self, found: Mapping[int, Gram | Tensor], none: Tensor) -> Gram | Tensor:
        """A of all b stacks, by the first of those that each is of; others stay zero (b, i)."""
        b, i = none.shape
        if not self._diagonal and self._is_wide(i):
            own = {start: part for start, part in found.items() if isinstance(part, LeadingGram)}
            like = next(iter(own.values()))
            blank = LeadingGram.of_rows(like.rows[:1, :0], like.rest.new_zeros(1), like.rank)
            stacks = [blank] * b
            for start, leading in own.items():
                stacks[start : start + len(leading.rows)] = leading.stacks()
            return LeadingGram.beside(stacks)
        if not self._diagonal:
            none = none[..., None].expand(-1, -1, i).clone()
        for start, part in found.items():
            matrices = part.matrices() if isinstance(part, Gram) else part
            none[start : start + len(matrices)] = matrices
        return none if self._diagonal else Gram.of(none)

    def _inputs(self, term: Term) -> tuple[Inputs, Tensor | None]:
        """The rows that count, and their mask; None where all do."""
        passed = self._passed
        if passed.seen.all_of(term.use) or term.use in passed.live_everywhere:
            return term.inputs, None
        live = passed.live(term.use)
        return term.inputs.keep(live), live

    def _rows(self, terms: Sequence[Term]) -> tuple[Gram | Tensor, Tensor]:
        """Σ a aᵀ over the rows, or its diagonal, and how many there are."""
        grams, count = [], torch.zeros((), dtype=torch.float64, device=self._device)
        for term in terms:
            inputs, live = self._inputs(term)
            dtype = self._dtype.of_rows(self._shared(term))
            whole = inputs.diagonal or not self._diagonal
            sums = inputs.gram if whole else inputs.gram_diagonal
            if not self._diagonal and self._is_wide(self._group.layout.matrix[2]):
                sums = partial(self._leading, inputs)
            make, key = partial(sums, dtype, self._passed.budget), self._key(term)
            grams.append(make() if key is None or live is not None else self._grams.take(key, make))
            count = count + (inputs.count if live is None else live.sum())
        return sum(grams[1:], grams[0]), count

    def _leading(self, inputs: Inputs, dtype: SumDtype, budget: Budget) -> Gram:
        """Σ a aᵀ over rows that are wide."""
        total: RowSum | None = None
        for piece in inputs.pieces(dtype, budget):
            if total is None:
                total = self._sum(len(piece), piece.shape[-1], piece, dtype)
            total.add(piece)
        assert total is not None
        return total.gram()

    def _means(self, terms: Sequence[Term]) -> tuple[Gram | Tensor, Tensor]:
        """Σ ā āᵀ over the means by example, likewise, and how many examples there are."""
        n, sums, counts = self._passed.n, [], []
        for term in terms:
            inputs, live = self._inputs(term)
            row_layout = self._passed.row_layout(term.use)
            sums.append(inputs.example_sums(row_layout, n))  # (b, n, i)
            if live is None:
                live = torch.ones((), device=self._device).expand(inputs.lead)
            counts.append(
                row_layout.by_example(live[None, ..., None].double(), n, 0)[0].sum((1, 2))
            )
        number = torch.stack(counts).sum(0)  # (n,)
        means = torch.stack(sums).sum(0)
        means = means / number.to(means.dtype).clamp_min(1)[:, None]
        if self._diagonal:
            dtype = torch.float64 if self._group.diagonal else self._dtype.sums(means)
            return means.square().sum(1, dtype=dtype), (number > 0).sum()
        total = self._sum(len(means), means.shape[-1], means, self._dtype)
        total.add(means)
        return total.gram(), (number > 0).sum()


def _may_drop(term: Term, n: int) -> bool:
    """Whether rows of a use may be left out of A: where examples have several, and in tables."""
    return term.inputs.droppable and (term.inputs.diagonal or term.inputs.count > n)
