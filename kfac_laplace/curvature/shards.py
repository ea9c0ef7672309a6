"""Each rank's part of the data, without the examples by which parts are made equally long."""

import copy
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, Sampler


class Unpadded(Sampler[int]):
    """The indices of a DistributedSampler, each on one rank alone.

    Where ranks do not divide the data, it repeats the first examples so that all ranks have as
    many: at most one of a rank, its last.

    Args:
        sampler: that of this rank.
    """

    def __init__(self, sampler: "DistributedSampler[Any]"):
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        """The indices."""
        return islice(iter(self.sampler), len(self))

    def __len__(self) -> int:
        """How many there are."""
        own = self.sampler
        repeated = own.total_size - len(own.dataset)  # type: ignore[arg-type]
        return own.num_samples - (own.rank >= own.num_replicas - repeated)


def own_part(loader: Iterable[Any]) -> Iterable[Any]:
    """A rank's loader without repeated examples; as it is where it has no DistributedSampler.

    Args:
        loader: a rank's. Its own sampler, batches and workers stay as they are.
    """
    sampler = _sampler(loader)
    if sampler is None:
        return loader
    unpadded, made = Unpadded(sampler), copy.copy(loader)
    # A DataLoader refuses new samplers by `__setattr__`; what it reads is its `__dict__`.
    own = vars(made)
    own["_iterator"] = None  # of workers that live on
    if own["sampler"] is sampler:
        own["sampler"] = unpadded
    if own["batch_sampler"] is not None:
        own["batch_sampler"] = copy.copy(own["batch_sampler"])
        own["batch_sampler"].sampler = unpadded
    return made


def places(loader: Iterable[Any], ranks: int) -> list[int] | None:
    """Places of a rank's examples in the data of all; None where its loader has not one part.

    Args:
        loader: a rank's, that does not shuffle: places are those in the data set then.
        ranks: how many there are.
    """
    sampler = _sampler(loader)
    if sampler is None or sampler.num_replicas != ranks:
        return None
    return [*Unpadded(sampler)]


def _sampler(loader: Iterable[Any]) -> "DistributedSampler[Any] | None":
    """The sampler by which a loader reads one rank's part."""
    if not isinstance(loader, DataLoader):
        return None
    for found in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(found, DistributedSampler):
            return found
    return None
