"""A of layers that meet the same rows, as queries, keys and values do: made once."""

from collections import Counter
from collections.abc import Callable, Hashable

from torch import Tensor

from kfac_laplace.curvature.linalg.gram import Gram


class SharedGrams:
    """Gram matrices of one pass by what they are made of.

    Those that several layers want are kept until the last has come.
    """

    def __init__(self) -> None:
        self._wanted: Counter[Hashable] = Counter()
        self._made: dict[Hashable, Gram] = {}

    def want(self, key: Hashable) -> None:
        """Say that one will be taken."""
        self._wanted[key] += 1

    def take(self, key: Hashable, make: Callable[[], Gram | Tensor]) -> Gram | Tensor:
        """One that nobody else holds, made unless it is there."""
        self._wanted[key] -= 1
        gram = self._made.pop(key, None) or make()
        if isinstance(gram, Gram) and self._wanted[key] > 0:
            self._made[key] = gram
            return gram.clone()
        return gram
