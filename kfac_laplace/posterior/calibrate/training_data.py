"""The loaders that a posterior has read, for what asks for their data once more."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingData:
    """Loaders as they were given. Copies share them, and pickles leave them out, as files do.

    Generators can be neither copied nor pickled, and a data set is not a posterior's to copy.

    Args:
        loaders: one after another, as `fit` got them.
    """

    loaders: tuple[Iterable[Any], ...] = ()

    def with_loader(self, loader: Iterable[Any], override: bool) -> "TrainingData":
        """With one more, or with that alone."""
        return TrainingData((loader,) if override else (*self.loaders, loader))

    def has(self, loader: Iterable[Any]) -> bool:
        """Whether a loader is one of them, and they are no more."""
        return len(self.loaders) == 1 and self.loaders[0] is loader

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainingData":
        """The same loaders."""
        return self

    def __reduce__(self) -> tuple[type["TrainingData"], tuple[()]]:
        """Without them."""
        return TrainingData, ()
