"""A pass over the data as a plan sees it: counted without numbers, timed on a few examples."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.blocks import Bases
from kfac_laplace.curvature.estimate.cancellation import EXAMPLES
from kfac_laplace.curvature.estimate.fisher import Empirical, Exact, MonteCarlo
from kfac_laplace.curvature.estimate.structures import Kron, LowRank
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.errors import KfacLaplaceError, UnsupportedUse
from kfac_laplace.planning.counter import Count, Operations
from kfac_laplace.planning.held import Held, eigenbases_in, held, more_products
from kfac_laplace.planning.rehearsal import (
    CYCLE,
    FEW,
    FORWARD,
    INPUTS,
    PARTS,
    ROOTS,
    VECTORS,
    Rehearsed,
    Scene,
    rehearse,
)
from kfac_laplace.planning.shapes import Shapes, some_targets
from kfac_laplace.planning.timing import Rehearsal, Seconds, Watch, gram_rate

#: Work of the examples that a timed pass takes; they are no fewer than a first batch looks at.
TIMED = 5e9
#: Seconds of a first batch in which what a process does once is lost.
LONG = 2.0


@dataclass(frozen=True)
class Data:
    """A batch, and how many of them there are.

    Args:
        batch: inputs.
        y: targets.
        batches: of the fit.
    """

    batch: AnyBatch
    y: Tensor
    batches: int

    def first(self, m: int) -> tuple[AnyBatch, Tensor]:
        """The first m examples, or all where they cannot be told apart."""
        if not isinstance(self.batch, Batch) or m >= self.batch.n or len(self.y) != self.batch.n:
            return self.batch, self.y
        return self.batch.select(torch.arange(m, device="cpu")), self.y[:m]


@dataclass(frozen=True)
class Learned:
    """What a first batch of a few examples has shown, on the device itself.

    Args:
        ggn: of them: groups, settings, blocks.
        total: number of vectors; None where their number does not depend on values.
        cut: whether vectors begin at the head's input.
        seconds: that it took.
    """

    ggn: GGN
    total: int | None
    cut: bool
    seconds: float


def learn(network: Network, ggn: GGN, data: Data, generator: Generator) -> Learned:
    """Run the first batch of a fit with few examples and few vectors."""
    fisher = ggn.options.fisher
    by_values = type(fisher) not in (Exact, MonteCarlo, Empirical)
    watch = Watch(FEW, FEW, network.device, counts_all=by_values)
    few = data.first(EXAMPLES)
    start = watch.now()
    found = Rehearsal(network, ggn, few, generator).run(ggn, watch)
    total = watch.total if by_values or watch.cut else None
    return Learned(found, total, watch.cut, watch.now() - start)


@dataclass(frozen=True)
class Stage:
    """One pass over the data.

    Args:
        network: the model.
        start: options and what is known before the first batch.
        learned: what real examples have shown; None where there are none.
        data: batches.
        rehearsed: a batch after others, counted.
        peak: most bytes at one time, blocks of earlier batches among them.
        held: bytes of the blocks.
        counted_on: "shapes" or "numbers".
    """

    network: Network
    start: GGN
    learned: Learned | None
    data: Data
    rehearsed: Rehearsed
    peak: int
    held: Held
    counted_on: str

    @property
    def vectors(self) -> int:
        """Vectors that are sent back through each batch."""
        return self.rehearsed.total

    @cached_property
    def operations(self) -> dict[str, Operations]:
        """Of one batch, by part."""
        found = dict(self.rehearsed.operations)
        return {**found, VECTORS: found[VECTORS] * self.vectors}

    @property
    def of_first(self) -> Operations:
        """About what the first batch takes beyond others: parts again, and a few vectors."""
        one = self.rehearsed.operations
        return one[FORWARD] * 1.5 + one[VECTORS] * 4

    def seconds(self, generator: Generator, bases: Mapping[str, Bases]) -> tuple[Seconds, int]:
        """Of a batch, by passes over some examples, and how many these are."""
        assert self.learned is not None
        known = self.learned.ggn
        ggn = replace(known, blocks={}, bases=bases)
        few = _few(ggn, self.data.batch.n)
        m = self._timed_examples(few)
        n = self.data.batch.n
        some, foreseen = self.data.first(m), ceil(self.vectors * n / m)
        found = Rehearsal(self.network, ggn, some, generator).seconds(few, foreseen)
        if not bases:
            took, sent = self.learned.seconds, FEW
            if m > EXAMPLES or took < LONG:  # there what is done once a process would tell
                start = Rehearsal(self.network, self.start, some, generator)
                took, sent = start.first(few, foreseen), few
            found = replace(found, first=max(0.0, took - found.of(sent)))
        return (found if m == n else self._scaled(found, m)), m

    def _timed_examples(self, few: int) -> int:
        one, n = self.rehearsed.operations, self.data.batch.n
        work = one[FORWARD].work + few * one[VECTORS].work + one[INPUTS].work + one[ROOTS].work
        m = max(EXAMPLES, int(TIMED / max(1.0, work / n)))
        whole = m >= n or not isinstance(self.data.batch, Batch) or len(self.data.y) != n
        return n if whole else m

    def _scaled(self, found: Seconds, m: int) -> Seconds:
        """Seconds of m examples as those of all: in proportion, and products that do not go so."""
        assert self.learned is not None
        n = self.data.batch.n
        ratio = n / m
        later = more_products(self.rehearsed.blocks, self.learned.ggn.blocks, n)
        # The first batch repeats parts of itself, and looks at a few examples beside.
        again = min(found.first, found.forward / 2 + 4 * found.vector)
        return Seconds(
            ratio * found.forward,
            ratio * found.roots,
            ratio * found.vector,
            ratio * found.rest + later / gram_rate(self.network.device),
            ratio * again + found.first - again,
        )


def stage(network: Network, start: GGN, learned: Learned | None, data: Data) -> Stage:
    """Count one pass over the data.

    On shapes alone where the model runs on them; else on the batch itself, a few vectors of it.
    """
    try:
        scene, on = _scene(network, start, learned, data), "shapes"
        one = rehearse(scene)
    except Exception as error:  # models raise what they like at tensors without numbers
        if learned is None:
            if isinstance(error, KfacLaplaceError):
                raise
            raise UnsupportedUse(
                "the model does not run on tensors without numbers",
                where="model",
                got=f"{type(error).__name__}: {error}",
                remedy="Plan with a smaller model that has numbers, or let it ask for no values",
            ) from error
        on = "numbers"
        one = _on_numbers(network, learned, data)
    blocks = held(one.blocks, data.batches)
    # A batch counts eigenbases itself.
    before = blocks.most - eigenbases_in(one.blocks) if data.batches > 1 else 0
    peak = max(one.first_peak, before + one.peak)
    return Stage(network, start, learned, data, one, peak, blocks, on)


def _scene(network: Network, start: GGN, learned: Learned | None, data: Data) -> Scene:
    """The stand-ins of a model and its batch."""
    shapes = Shapes()
    ggn = start if learned is None else replace(learned.ggn, blocks={}, bases={})
    standing = replace(network, model=shapes.model(network.model))
    x = shapes.inputs(data.batch.x)
    own = standing.batch(x, data.batch.n, ggn.knowledge.interface)
    total = None if learned is None else learned.total
    moves = learned is None or bool(learned.ggn.knowledge.unread)
    looks = not start.bases
    return Scene(
        standing, ggn, own, some_targets(data.y), total, looks, moves and looks, data.batches
    )


def _on_numbers(network: Network, learned: Learned, data: Data) -> Rehearsed:
    """Count on the batch itself."""
    count, generator = Count(), Generator()
    ggn = replace(learned.ggn, bases=learned.ggn.bases)
    watch = Watch(_few(ggn, data.batch.n), FEW, network.device, enter=count.enter)
    model = network.model
    count.leave_out([*model.parameters(), *model.buffers(), *data.batch.data, data.y])
    for block in ggn.blocks.values():
        count.leave_out(block.tensors().values())
    with count.watching():
        count.enter(FORWARD)
        found = Rehearsal(network, ggn, (data.batch, data.y), generator).run(ggn, watch)
    operations = {part: count.of(part) for part in PARTS}
    operations[VECTORS] *= 1 / max(1, min(watch.few, watch.total))
    total = learned.total or _total(learned, network, data)
    return Rehearsed(
        operations,
        count.peak,
        count.peak,
        found.knowledge,
        found.settings,
        total,
        watch.cut,
        found.blocks,
        copied=False,
    )


def _total(learned: Learned, network: Network, data: Data) -> int:
    """How many vectors there are, where that does not depend on values."""
    fisher, ggn = learned.ggn.options.fisher, learned.ggn
    if type(fisher) is not Exact:
        return int(getattr(fisher, "samples", 1))
    per_row = max(1, round(ggn.n_outputs / max(1.0, ggn.n_rows)))
    return fisher.count(ggn.likelihood, torch.zeros(1, 1, per_row, device="cpu"), data.y[:1])


def _few(ggn: GGN, n: int) -> int:
    """How many vectors show what all of them take."""
    structure = ggn.options.hessian_structure
    if isinstance(structure, LowRank | Kron):
        return min(CYCLE, 1 + 2 * structure.rank // n)
    return FEW + 1
