"""What a fit will take, as numbers and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from kfac_laplace.summary import aligned


@dataclass(frozen=True)
class Part:
    """A part of the work.

    Args:
        name: what it is.
        times: how often it is done.
        operations: floating-point operations, all times together.
        seconds: likewise.
    """

    name: str
    times: int
    operations: float
    seconds: float

    @property
    def cells(self) -> list[str]:
        """As a row of the table."""
        done = f"{self.operations:.3g}" if self.operations else "–"
        return [self.name, str(self.times) if self.times else "–", done, duration(self.seconds)]


@dataclass(frozen=True)
class Memory:
    """Bytes, beside the model and the batch.

    Args:
        peak: most that tensors take at one time during the fit, factors among them.
        factors: held when it is done.
        decompositions: held for log-determinants beside these, from the first one on.
        bases: held for predictions and samples beside these.
    """

    peak: int
    factors: int
    decompositions: int
    bases: int

    @property
    def temporary(self) -> int:
        """What the fit takes at its peak over what it leaves."""
        return max(0, self.peak - self.factors)


@dataclass(frozen=True)
class Plan:
    """What a fit takes, and what is asked of it takes afterwards.

    Floating-point operations are those of products, convolutions and decompositions; an addition
    and a multiplication are two. Bytes are those of tensors: what libraries take inside does not
    count, nor do the model, the batch and the data.

    Args:
        head: likelihood, structure and size, on one line.
        n_data: examples of the fit.
        examples: examples of a batch.
        batches: batches of the fit, the last counted whole.
        forwards: forward passes over a batch, without the checks of the first batch.
        vectors: vectors that are sent back through a batch.
        backwards: backward passes, all batches together.
        parts: of the fit.
        later: the first log-determinant and the first prediction.
        memory: bytes.
        rate: where seconds come from.
        notes: what the numbers leave open.
    """

    head: str
    n_data: int
    examples: int
    batches: int
    forwards: int
    vectors: int
    backwards: int
    parts: tuple[Part, ...]
    later: tuple[Part, ...]
    memory: Memory
    rate: str
    notes: tuple[str, ...] = ()

    @property
    def operations(self) -> float:
        """Floating-point operations of the fit."""
        return sum(part.operations for part in self.parts)

    @property
    def seconds(self) -> float:
        """Seconds of the fit."""
        return sum(part.seconds for part in self.parts)

    def __str__(self) -> str:
        """A table of parts, one of bytes, and what the numbers leave open."""
        fit = Part("the fit", 0, self.operations, self.seconds)
        parts = [["part", "times", "operations", "time"]]
        parts += [part.cells for part in (*self.parts, fit, *self.later)]
        memory = self.memory
        sizes = [
            ["memory beside model and batch", ""],
            ["at the peak of the fit", size(memory.peak)],
            ["factors", size(memory.factors)],
            ["for log-determinants", size(memory.decompositions)],
            ["for predictions", size(memory.bases)],
        ]
        passes = (
            f"{self.n_data} examples in {_number(self.batches, 'batch', 'batches')} of "
            f"{self.examples}: {_number(self.forwards, 'forward pass', 'forward passes')}, "
            f"{_number(self.vectors, 'vector', 'vectors')} back through each batch"
        )
        notes: Sequence[str] = [f"Seconds: {self.rate}.", *self.notes]
        return "\n".join([self.head, passes, "", *aligned(parts), "", *aligned(sizes), "", *notes])


def size(count: float) -> str:
    """Bytes in words."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} {units[0]}" if units[0] == "B" else f"{count:.3g} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
