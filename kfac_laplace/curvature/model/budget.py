"""How much memory temporary tensors may take: one number, and what each computation gets of it.

What is computed does not depend on it: a smaller budget takes examples, vectors or samples in
smaller pieces, of which one is always taken. Blocks, bases and the graph of a forward pass are no
temporary tensors and do not count.

Other thresholds stay where they are used, because memory must not move them: they say what is
computed (sizes of dense blocks, how many points are left out), what is rounding, or what a cache
holds and which of two ways is faster.
"""

from dataclasses import dataclass

from torch import Tensor

from kfac_laplace.options import check_whole

#: Bytes by default, on a CPU and on other devices.
CPU, DEVICE = 2**30, 2**33
#: Entries are counted as if they were float64, of whatever precision they are.
ENTRY = 8
#: Products of so many entries stay in a CPU's cache; larger ones are slower, however much memory
#: there is.
CACHED_PRODUCTS = 2**20


@dataclass(frozen=True)
class Budget:
    """Bytes that temporary tensors may take together, about, and each computation's share of them.

    Shares follow what was measured as fast on a CPU at the default: several temporary tensors of a
    computation exist beside each other, so that most of them are small. All of it goes to the
    features of leave-one-out, which are the only large ones of their time.

    Args:
        size: bytes, or None for the default of the device: 1 GiB on a CPU, 8 GiB elsewhere.

    Raises:
        InvalidType: no whole number.
        InvalidValue: less than one byte.
    """

    size: int | None = None

    def __post_init__(self) -> None:
        """Check the size."""
        if self.size is not None:
            check_whole("memory_budget", self.size, 1)

    def bytes(self, like: Tensor) -> int:
        """All of it, on the device of a tensor."""
        if self.size is not None:
            return self.size
        return CPU if like.device.type == "cpu" else DEVICE

    def gradients(self, like: Tensor) -> int:
        """Entries of per-example gradients: an eighth, 2²⁴ by default."""
        return self.bytes(like) // (8 * ENTRY)

    def patches(self, like: Tensor) -> int:
        """Entries of convolutions' patches, or of copies of their inputs: a 16th, 2²³."""
        return self.bytes(like) // (16 * ENTRY)

    def hessians(self, like: Tensor) -> int:
        """Entries of matrices by example in a head of many outputs: a 64th, 2²¹."""
        return self.bytes(like) // (64 * ENTRY)

    def gradient_rows(self, like: Tensor) -> int:
        """Entries of the gradient rows of predictives: 3/64, in their own precision; 48 MiB."""
        return 3 * self.bytes(like) // (64 * max(4, like.element_size()))

    def products(self, like: Tensor) -> int:
        """Entries of products in predictive covariances: a 32nd, and no more than the cache."""
        entries = self.bytes(like) // (32 * ENTRY)
        return min(entries, CACHED_PRODUCTS) if like.device.type == "cpu" else entries

    def features(self, like: Tensor) -> int:
        """Entries of the features of all points that leave-one-out compares: all, 2²⁷."""
        return self.bytes(like) // ENTRY

    def samples(self, entries: int, most: int) -> int:
        """How many of `most` weight samples of so many entries to hold; by default all of them.

        Random numbers of all are drawn for each part of them: that costs time.
        """
        return most if self.size is None else min(most, at_once(entries, self.size // ENTRY))


def at_once(entries: int, limit: int) -> int:
    """How many things of so many entries to hold at a time under a limit of entries: at least 1."""
    return max(1, limit // max(1, entries))
