"""Seconds of a batch's parts, by passes over a few examples on the device itself."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.accumulate import with_batch
from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.estimate.estimator import Estimand
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.linalg.gram import GramSum
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.devices import finish
from kfac_laplace.planning.rehearsal import INPUTS, ROOTS, VECTORS

#: Passes of which the median counts.
PASSES = 3
#: Seconds after which no other pass is made.
ENOUGH = 3.0
#: Vectors of so many are not alike.
SOME = 4


@dataclass
class Watch:
    """Lets a few vectors through and notes when.

    Args:
        few: how many.
        foreseen: how many were to come, by which sums multiply few rows or keep them.
        device: whose work is waited for.
        counts_all: whether to draw the others as well, to see how many there are.
        enter: told which part of the work begins.
    """

    few: int
    foreseen: int
    device: torch.device
    counts_all: bool = False
    total: int = 0
    cut: bool = False
    start: float = 0.0
    first: float = 0.0
    drawing: list[float] = field(default_factory=list)
    sending: list[float] = field(default_factory=list)
    last: float = 0.0
    enter: Callable[[str], None] | None = None

    def amend(self, estimand: Estimand) -> Estimand:
        """The same, watched."""
        return replace(estimand, passing=self._passing, foreseen=self.foreseen)

    def now(self) -> float:
        """Seconds, once the device has done its work."""
        finish(self.device)
        return perf_counter()

    def _passing(self, vectors: Iterator[Tensor]) -> Iterator[Tensor]:
        self.first = before = self.now()
        self._tell(ROOTS)
        for vector in vectors:
            drawn = self.now()
            self.cut = vector.ndim == 2
            self.total += 1
            self.drawing.append(drawn - before)
            if self.total <= self.few:
                self._tell(VECTORS)
                yield vector
                self._tell(ROOTS)
                self.sending.append(self.now() - drawn)
            if self.total >= self.few and not (self.counts_all or self.cut):
                break
            before = self.now()
        self.last = self.now()
        self._tell(INPUTS)

    def parts(self, start: float) -> tuple[float, ...]:
        """What `Seconds` has, of a pass that began at `start` and is over now."""
        end = self.now()
        # Where vectors are many, a structure does more after some of them: the mean counts.
        usual = median if self.few < SOME else mean
        if not self.sending:
            return self.first - start, 0.0, 0.0, end - self.last
        sending = usual(self.sending[1:] or self.sending)
        drawing = median(self.drawing[1:] or self.drawing)
        roots = max(0.0, self.drawing[0] - drawing) if self.cut else 0.0
        return self.first - start, roots, sending + drawing, end - self.last

    def _tell(self, part: str) -> None:
        if self.enter is not None:
            self.enter(part)


@dataclass(frozen=True)
class Seconds:
    """Seconds of the parts of a batch.

    Args:
        forward: from the batch to the first vector: the forward pass, and checks.
        roots: before the first vector is there, beyond what each later one takes.
        vector: making one and sending it back, with the sums that its rows go into.
        rest: what comes after the last: sums over inputs, adding to what was there.
        first: what the first batch takes beyond a later one.
    """

    forward: float
    roots: float
    vector: float
    rest: float
    first: float = 0.0

    def of(self, vectors: int) -> float:
        """A batch after the first, with so many vectors."""
        return self.forward + self.roots + vectors * self.vector + self.rest


@dataclass(frozen=True)
class Rehearsal:
    """A batch on the device itself.

    Args:
        network: the model.
        ggn: options, what is known, and bases.
        data: inputs, and targets.
        generator: of labels and signs.
    """

    network: Network
    ggn: GGN
    data: tuple[AnyBatch, Tensor]
    generator: Generator

    def run(self, ggn: GGN, watch: Watch) -> GGN:
        """One batch of a few vectors after others."""
        draws = self.generator.get_state()
        try:
            return with_batch(ggn, self.network, self.data, self.generator, amend=watch.amend)
        finally:
            self.generator.set_state(draws)

    def seconds(self, few: int, foreseen: int) -> Seconds:
        """Medians over some passes, fewer where one takes long.

        Args:
            few: how many vectors to send back.
            foreseen: how many a fit sends.
        """
        parts: list[tuple[float, ...]] = []
        ggn, begin = self.ggn, perf_counter()
        while len(parts) <= PASSES and (len(parts) < 2 or perf_counter() - begin < ENOUGH):
            watch = Watch(few, foreseen, self.network.device)
            start = watch.now()
            found = self.run(ggn, watch)
            parts.append(watch.parts(start))
            if len(parts) == 1 and not _keeps_rows(found):  # whose products come once in a while
                ggn = found
        return Seconds(*(median(each) for each in zip(*parts[1:], strict=True)))

    def first(self, few: int, foreseen: int) -> float:
        """Seconds of a first batch, by one pass; arguments as for `seconds`."""
        watch = Watch(few, foreseen, self.network.device)
        start = watch.now()
        self.run(self.ggn, watch)
        return watch.now() - start


def _keeps_rows(ggn: GGN) -> bool:
    """Whether some factor is rows as they are."""
    kronecker = [block for block in ggn.blocks.values() if isinstance(block, KroneckerBlock)]
    return any(block.input_rows.numel() or block.output_rows.numel() for block in kronecker)


def gram_rate(device: torch.device, rows: int = 256, columns: int = 1100) -> float:
    """Operations a second of products of rows with themselves, summed in float64."""
    some = torch.ones(1, rows, columns, device=device)

    def work() -> None:
        total = GramSum(1, columns, some, SumDtype())
        total.foresee(columns * rows)
        total.add(some)

    return rows * columns * (columns + 1) / timed(work, device)


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 512) -> float:
    """Operations a second of a product of two square matrices, by the median of a few."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / timed(lambda: a @ a, device)


def eigen_seconds(sizes: Iterable[int], device: torch.device, vectors: bool) -> dict[int, float]:
    """Seconds for symmetric matrices in float64, by size.

    Those beyond `LARGEST` rows are taken from one of so many, as d³ grows.
    """
    found: dict[int, float] = {}
    for some in {min(size, LARGEST) for size in sizes}:
        a = torch.linspace(0, 1, some * some, dtype=torch.float64, device=device)
        a = ((37.0 * a) % 1).reshape(some, some)
        work = partial(torch.linalg.eigh if vectors else torch.linalg.eigvalsh, a + a.mT)
        found[some] = timed(work, device, 1 if some > MIDDLE else PASSES)
    return {size: found[min(size, LARGEST)] * (size / min(size, LARGEST)) ** 3 for size in sizes}


#: Rows of the largest matrix that is decomposed to see how long it takes.
LARGEST = 384
#: Matrices with more rows are decomposed once.
MIDDLE = 128


def timed(work: Callable[[], Any], device: torch.device, times: int = PASSES) -> float:
    """Median seconds of a call, once it has been warmed up."""
    watch = Watch(0, 0, device)
    found = []
    for _ in range(times + 1):
        start = watch.now()
        work()
        found.append(watch.now() - start)
    return median(found[1:])
