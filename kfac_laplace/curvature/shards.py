"""Each rank's part of the data, without the examples by which parts are made equally long."""

import copy
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

from kfac_laplace.curvature.ranks import Ranks, ranks_of
from kfac_laplace.errors import InvalidValue, UnsupportedUse

log = logging.getLogger("kfac_laplace")


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


def own_part(loader: Iterable[Any], ranks: Ranks) -> Iterable[Any]:
    """A rank's loader without repeated examples; as it is where it has no DistributedSampler.

    Args:
        loader: a rank's. Its own sampler, batches and workers stay as they are.
        ranks: the processes.

    Raises:
        InvalidValue: the sampler has another number of parts.
    """
    sampler = _sampler(loader)
    if sampler is None:
        return loader
    if sampler.num_replicas != ranks.size:
        raise InvalidValue(
            "the loader's sampler makes other parts than the group has ranks",
            where="process_group",
            got=f"{sampler.num_replicas} parts for {ranks.size} ranks",
            remedy="Make DistributedSampler with the num_replicas and rank of the group",
        )
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


def ranks_reading(group: Any, loader: Iterable[Any]) -> Ranks | None:
    """The processes of which each reads a part of a loader; None where this one reads all of it.

    Args:
        group: an option `process_group`.
        loader: a part has a DistributedSampler.
    """
    return None if group is None or _sampler(loader) is None else ranks_of(group)


def tell_of_a_part(loader: Iterable[Any]) -> None:
    """Warn where one process alone reads a part of the data, as a DistributedSampler makes it."""
    sampler = _sampler(loader)
    if sampler is not None and sampler.num_replicas > 1:
        log.warning(
            "the loader's DistributedSampler makes one of %d parts of the data, which is then all "
            "that counts: pass process_group='world' to add those of other processes, or a loader "
            "of all data",
            sampler.num_replicas,
        )


def check_all_data(group: Any, loader: Iterable[Any], where: str) -> None:
    """Raise `UnsupportedUse` for a loader of a part, where each process looks at all data.

    Args:
        group: an option `process_group`.
        loader: of data.
        where: what asks for them.
    """
    if ranks_reading(group, loader) is not None:
        raise UnsupportedUse(
            "each process looks at all of the data here",
            where=where,
            got="a loader with DistributedSampler, of a part of them",
            remedy="Pass a loader of all",
        )


def indices(part: Iterable[Any]) -> list[int]:
    """Places in the data set of the examples that `own_part` yields, in its order.

    Raises:
        UnsupportedUse: batches are put together by a sampler of the user's own, which may not do it
            the same way twice.
    """
    assert isinstance(part, DataLoader)
    if part.batch_sampler is None:
        return [*part.sampler]
    if type(part.batch_sampler) is not BatchSampler:
        raise UnsupportedUse(
            "the order of predictions is not known",
            where="loader",
            got=f"batch_sampler={type(part.batch_sampler).__name__}",
            remedy="Give the loader sampler=DistributedSampler(...) and batch_size=",
        )
    return [index for batch in part.batch_sampler for index in batch]


def _sampler(loader: Iterable[Any]) -> "DistributedSampler[Any] | None":
    """The sampler by which a loader reads one rank's part."""
    if not isinstance(loader, DataLoader):
        return None
    for found in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(found, DistributedSampler):
            return found
    return None
