"""Training data as the rows of a log-determinant: which examples, and which vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.fisher import Fisher
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.model.batches import AnyBatch, split_batch
from kfac_laplace.curvature.model.graphs import GraphBatch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import aligned_target
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives.registry import Data
from kfac_laplace.posterior.objectives.rows import Part, rows_of
from kfac_laplace.posterior.passes import counted, recorded
from kfac_laplace.process import draws_kept


@dataclass(frozen=True)
class Points:
    """Some examples with their targets, and the seed of the vectors drawn for them.

    Args:
        batch: inputs.
        y: their targets, as the loader gave them.
        seed: of the vectors.
    """

    batch: AnyBatch
    y: Tensor
    seed: int

    def pieces(self, step: int) -> "Iterator[Points]":
        """At most `step` examples at a time, where targets follow the examples."""
        if self.batch.n <= step or len(self.y) != self.batch.n:
            yield self
            return
        start = 0
        batches: Iterator[AnyBatch] = self.batch.split(step)  # graphs that stay whole are one
        for batch in batches:
            yield Points(
                batch, self.y[start : start + batch.n], self.seed + 1_000_003 * (start + 1)
            )
            start += batch.n


def chosen_points(posterior: Posterior, data: Data, count: int | None = None) -> list[Points]:
    """The training data, or `count` examples of them at random.

    Batches that cannot be divided are taken whole, or not at all, so that it may be more or less.

    Args:
        posterior: fitted to them.
        data: where they come from.
        count: number of examples; None for all.

    Raises:
        InvalidValue: another number of examples than the fit saw.
    """
    ggn = posterior.ggn
    n_data = int(ggn.n_data)
    chosen = torch.ones(n_data, dtype=torch.bool, device="cpu")
    if count is not None and count < n_data:
        generator = torch.Generator().manual_seed(data.seed)
        chosen = torch.zeros(n_data, dtype=torch.bool, device="cpu")
        chosen[torch.randperm(n_data, generator=generator, device="cpu")[:count]] = True
    found: list[Points] = []
    seen = 0
    with draws_kept():
        for k, raw in enumerate(data.batches()):
            x, y = split_batch(raw, data.key_y, ggn.options.batch_fn)
            batch = counted(posterior, x, y)
            here = chosen[seen : seen + batch.n]
            seen += batch.n
            if seen > n_data:
                break
            found += _picked(batch, y, here, data.seed + 7919 * (k + 1))
    if seen != n_data:
        raise InvalidValue(
            "this objective looks at the training data once more, and finds others",
            where="loader",
            got=f"{'more than ' if seen > n_data else ''}{min(seen, n_data)} examples where the "
            f"fit saw {n_data}",
            remedy="Pass a loader that can be read again (a generator can be read only once), or "
            "use objective='kron'",
        )
    return found or chosen_points(posterior, data)


def _picked(batch: AnyBatch, y: Tensor, here: Tensor, seed: int) -> list[Points]:
    """The chosen examples of a batch with their targets, by example or node."""
    if bool(here.all()):
        return [Points(batch, y, seed)]
    index = here.nonzero()[:, 0]
    if isinstance(batch, GraphBatch) and not batch.divisible:  # by lot, of its first example
        return [Points(batch, y, seed)] if bool(here[0]) else []
    if not len(index):
        return []
    nodes = batch.segments.get("nodes")
    mask = here if len(y) == batch.n or nodes is None else here[nodes.cpu()]
    return [Points(batch.select(index), y[mask.to(y.device)], seed)]


def count_of(points: Sequence[Points]) -> int:
    """How many examples these are."""
    return sum(each.batch.n for each in points)


@dataclass(frozen=True)
class Looked:
    """How points are looked at.

    Args:
        posterior: the model runs at its mode.
        fisher: which vectors.
        vectors: how many for each example; None for one for each of its outputs.
    """

    posterior: Posterior
    fisher: Fisher
    vectors: int | None = None

    @property
    def each(self) -> int:
        """Rows of an example, at the most."""
        ggn = self.posterior.ggn
        return self.vectors or max(1, round(ggn.n_outputs / ggn.n_data))

    def rows(self, points: Points) -> list[Part]:
        """Rows of some points, vector by vector."""
        posterior = self.posterior
        with undisturbed(posterior.network.model):
            passed = recorded(posterior, points.batch)
            generator = torch.Generator().manual_seed(points.seed)
            vectors = self._drawn(passed, points.y, generator)
            return rows_of(passed, posterior.ggn.groups, vectors)

    def _drawn(self, passed: ForwardPass, y: Tensor, generator: Generator) -> list[Tensor]:
        likelihood, axis = passed.likelihood, self.posterior.ggn.knowledge.class_axis
        f = passed.output_rows.detach()
        shape = passed.recording.output.shape
        y = aligned_target(likelihood, y.to(f.device), shape, f, axis)
        targets = passed.by_example(y)
        outputs = passed.outputs.detach()
        return [*self.fisher.vectors(likelihood, outputs, targets, generator)]
