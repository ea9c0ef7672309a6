"""The data of a framework's training loop, in order, for passes over all of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from kfac_laplace.errors import InvalidValue

#: Samplers that draw each example of a data set once an epoch.
EACH_ONCE = {SequentialSampler, RandomSampler, DistributedSampler}
#: Whose loaders and samplers have their own ways through the same examples.
SAME_EXAMPLES = "accelerate.data_loader"


@dataclass(frozen=True)
class TrainingData:
    """What rounds read, and what the loss weighs the prior by.

    Args:
        loader: all training examples.
        n_data: their number.
    """

    loader: Iterable[Any]
    n_data: int

    @classmethod
    def of(
        cls, training: Any, loader: Iterable[Any] | None, n_data: int | None, ranks: int
    ) -> "TrainingData":
        """That of a training loader.

        A loader that draws each example once is read in order, without shuffling, ranks or dropped
        batches, so that the random numbers of training stay what they are.

        Args:
            training: what the framework reads.
            loader: what the caller gave for the passes.
            n_data: what the caller gave.
            ranks: number of processes that train.

        Raises:
            InvalidValue: their number or, where several ranks train, the whole data cannot be told.
        """
        ordered = in_order(training) if loader is None else loader
        if ordered is None and ranks > 1:
            raise InvalidValue(
                "each rank reads a share of the data, and what the whole is cannot be told",
                where="training loader",
                got=_kind(training),
                remedy="Pass MarglikCallback(loader=...), a loader of all training data",
            )
        read = training if ordered is None else ordered
        if n_data is None:
            n_data = _count(read)
        return cls(read, n_data)


def in_order(training: Any) -> DataLoader[Any] | None:
    """A loader of the same data set in its order; None where it is read in another way."""
    if not isinstance(training, DataLoader) or isinstance(training.dataset, IterableDataset):
        return None
    if _way_of(training) not in (DataLoader, SAME_EXAMPLES):  # which may change what is loaded
        return None
    if training.batch_sampler is None:  # examples come as batches
        return None
    if not _draws_each_once(training):
        return None
    return DataLoader(
        training.dataset,
        batch_size=_batch_size(training),
        num_workers=training.num_workers,
        collate_fn=training.collate_fn,
        generator=torch.Generator(),  # workers draw their seed from it
        multiprocessing_context=training.multiprocessing_context,
        worker_init_fn=training.worker_init_fn,
    )


def _draws_each_once(training: DataLoader[Any]) -> bool:
    """Whether an epoch of a loader, over all ranks, is the data set."""
    batches, length = training.batch_sampler, len(training.dataset)  # type: ignore[arg-type]
    batches = getattr(batches, "batch_sampler", batches)  # accelerate's share of a rank
    if type(batches) is not BatchSampler:
        return False
    sampler: Any = batches.sampler
    known = {*type(sampler).__mro__} & EACH_ONCE
    if not known or getattr(sampler, "replacement", False):
        return False
    if _way_of(sampler) not in (*EACH_ONCE, SAME_EXAMPLES):
        return False
    whole = getattr(sampler, "dataset", getattr(sampler, "data_source", None))
    drawn = getattr(sampler, "num_samples", length)
    return whole is not None and (DistributedSampler in known or drawn == length)


def _way_of(iterable: Any) -> type | str:
    """The class whose `__iter__` it has, `SAME_EXAMPLES` for any from there."""
    own = next(kind for kind in type(iterable).__mro__ if "__iter__" in vars(kind))
    return SAME_EXAMPLES if own.__module__ == SAME_EXAMPLES else own


def _batch_size(training: DataLoader[Any]) -> int:
    batches: Any = training.batch_sampler
    return int(getattr(getattr(batches, "batch_sampler", batches), "batch_size", 1))


def _count(loader: Any) -> int:
    """Number of examples of a loader; `InvalidValue` where it does not tell."""
    try:
        if getattr(loader, "batch_sampler", None) is None:
            raise TypeError
        return len(loader.dataset)
    except (AttributeError, TypeError):
        raise InvalidValue(
            "the number of training examples cannot be told",
            where="n_data",
            got=_kind(loader),
            remedy="Pass MarglikCallback(n_data=...), by which the loss weighs the prior",
        ) from None


def _kind(loader: Any) -> str:
    sampler = type(getattr(loader, "sampler", None)).__name__
    return f"{type(loader).__name__} with {sampler}"
