"""The blocks of one batch: sums over backward vectors, group by group."""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from kfac_laplace.curvature.estimate import accumulators as sums
from kfac_laplace.curvature.estimate import fisher as fishers
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.head import Cut, find_cut
from kfac_laplace.curvature.gradients.forward_pass import Pass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import without_autocast
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.recording.backward import Backward

if TYPE_CHECKING:
    from kfac_laplace.curvature.ggn import Curvature

log = logging.getLogger("kfac_laplace")


class Estimator:
    """Makes the blocks of one recorded pass.

    Args:
        curvature: says which structure, settings and estimator; it is not changed, but for draws
            from its generator.
        passed: the forward pass over the batch.
    """

    def __init__(self, curvature: "Curvature", passed: Pass):
        self._curvature, self._passed = curvature, passed
        self._dtype = curvature.sum_dtype

    def blocks(self, y: Tensor) -> dict[str, Block]:
        """The blocks of the batch, for aligned targets y."""
        with without_autocast(self._passed.network.device):
            made = self._batch_sums()
        cut = find_cut(self._passed, self._curvature.groups, self._dtype) if self._may_cut else None
        if cut is None:
            self._add_vectors(made, y)
        else:
            made = self._add_cut(cut, made, self._curvature.likelihood.importance(y))
        if not self._passed.network.watched:
            self._warn_of_cancellation(made)
        # One by one, so that the sums of a finished block need no memory beside the next.
        with without_autocast(self._passed.network.device):
            return {name: made.pop(name).block() for name in list(made)}

    def _add_vectors(self, made: dict[str, sums.Accumulator], y: Tensor) -> None:
        """Add the estimator's vectors, from the outputs."""
        f = self._passed.outputs.detach()
        vectors = self._curvature.fisher.vectors(
            self._curvature.likelihood, f, y, self._curvature.generator
        )
        wanted = frozenset[int]().union(*(batch_sum.uses for batch_sum in made.values()))
        backward = Backward(self._passed.recording, self._passed.outputs, sorted(wanted))
        for piece in _pieces(vectors, self._piece_length()):
            generic = self._passed.generic_gradients(self._curvature.groups, piece)
            for k, vector in enumerate(piece):
                one = {name: gradients[k : k + 1] for name, gradients in generic.items()}
                self._add_vector(backward, vector, made, one)

    def _add_vector(
        self,
        backward: Backward,
        vector: Tensor,
        made: Mapping[str, sums.Accumulator],
        generic: Mapping[str, Tensor],
    ) -> None:
        """Backpropagate a vector and add what it contributes to each sum."""

        def receive(u: int, rows: Tensor) -> None:
            for batch_sum in made.values():
                if u in batch_sum.uses:
                    batch_sum.receive(u, rows)

        backward(vector, receive)
        with without_autocast(self._passed.network.device):
            for batch_sum in made.values():
                batch_sum.finish_vector(generic)

    @property
    def _may_cut(self) -> bool:
        """Whether all that is wanted of the head is its B, by the exact Λ."""
        return (
            self._curvature.hessian_structure == "kron"
            and type(self._curvature.fisher) is fishers.Exact
        )

    def _add_cut(
        self, cut: Cut, made: dict[str, sums.Accumulator], importance: Tensor | None
    ) -> dict[str, sums.Accumulator]:
        """Add vectors from the head's input; the sums, with the head's own among them."""
        with without_autocast(self._passed.network.device):
            made = cut.with_head(made, self._curvature.likelihood, importance)
        if cut.h is not None:
            backward = Backward(self._passed.recording, cut.h, cut.below)
            for root in cut.roots(self._curvature.likelihood, importance):
                self._add_vector(backward, root, made, {})
        return made

    def _warn_of_cancellation(self, made: dict[str, sums.Accumulator]) -> None:
        """Say where reduce sees no curvature although there is some."""
        blind = [
            name
            for name, batch_sum in made.items()
            if isinstance(batch_sum, sums.KroneckerAccumulator) and batch_sum.cancels()
        ]
        if blind:
            log.warning(
                "K-FAC-reduce sees no curvature in %s: an example's gradients cancel over the "
                "shared axis, as those of attention keys do. Give each of them the setting "
                "'expand', as in kfac_approx={'%s': 'expand', '*': 'auto'}",
                ", ".join(blind),
                blind[0],
            )
        self._passed.network.watched = True

    def _batch_sums(self) -> dict[str, sums.Accumulator]:
        """An empty sum for each block."""
        if self._curvature.hessian_structure == "full":
            return {
                "full": sums.DenseAccumulator(
                    self._curvature.groups, self._curvature.full_layout, self._passed, self._dtype
                )
            }
        return {group.name: self._batch_sum(group) for group in self._curvature.groups}

    def _batch_sum(self, group: Group) -> sums.Accumulator:
        """The sum for a group's block, by its structure."""
        treatment = group.treatment if self._curvature.hessian_structure == "kron" else "diag"
        if treatment == "kron":
            return sums.KroneckerAccumulator(
                group, self._passed, self._curvature.settings[group.name], self._dtype
            )
        if treatment == "dense":
            return sums.DenseAccumulator([group], group.layout, self._passed, self._dtype)
        return sums.DiagonalAccumulator(group, self._passed)

    def _piece_length(self) -> int:
        """How many vectors to hold at a time, by the size of the generic gradients they yield."""
        generic = sum(
            group.layout.size
            for group in self._curvature.groups
            if group.name in self._passed.without_rules
        )
        f = self._passed.outputs
        return at_once(self._passed.n * generic + f.numel(), self._passed.budget.gradients(f))


def _pieces(vectors: Iterator[Tensor], length: int) -> Iterator[list[Tensor]]:
    """Lists of at most `length` vectors."""
    while piece := list(islice(vectors, length)):
        yield piece
