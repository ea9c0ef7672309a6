"""What rounds read of a training loader: the data set in order only where training reads it so."""

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kfac_laplace.integrations.training_data import TrainingData, in_order

DATA = TensorDataset(torch.arange(7.0)[:, None])


class Scaled(DataLoader):
    """Changes what it loads."""

    def __iter__(self):
        for (x,) in super().__iter__():
            yield (100 * x,)


class Named(DataLoader):
    """Has an attribute of its own, and reads as any."""

    name = "train"


class Few(RandomSampler):
    """Draws the first three alone."""

    def __iter__(self):
        return iter([2, 0, 1] * 2)


def ranks(shuffle):
    return DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=shuffle)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_size=3, shuffle=True),
        DataLoader(DATA, batch_size=3, shuffle=True, drop_last=True),
        DataLoader(DATA, batch_size=3, sampler=ranks(True)),
        Named(DATA, batch_size=3, shuffle=True),
    ],
    ids=["shuffled", "dropped", "ranks", "named"],
)
def test_data_that_are_read_once_are_read_in_order(loader):
    batches = [x for (x,) in in_order(loader)]
    assert [len(x) for x in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), DATA.tensors[0])


@pytest.mark.parametrize(
    "loader",
    [
        Scaled(DATA, batch_size=3),
        DataLoader(DATA, batch_size=3, sampler=Few(DATA)),
        DataLoader(DATA, batch_size=3, sampler=WeightedRandomSampler(torch.ones(7), 7)),
    ],
    ids=["scaled", "few", "weighted"],
)
def test_other_ways_through_the_data_are_left_to_the_loader(loader):
    assert in_order(loader) is None
    assert TrainingData.of(loader, None, None, 1).loader is loader


def test_a_share_of_another_sampler_is_not_the_data():
    """Lightning deals the draws of any sampler out to ranks by a `DistributedSampler`."""
    distributed = pytest.importorskip("lightning.fabric.utilities.distributed")
    drawn = WeightedRandomSampler(torch.ones(7), 7)
    share = distributed.DistributedSamplerWrapper(drawn, num_replicas=2, rank=0)
    assert in_order(DataLoader(DATA, batch_size=3, sampler=share)) is None


def test_loaders_of_accelerate_read_the_same_data():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.data_loader.prepare_data_loader(
        DataLoader(DATA, batch_size=3, shuffle=True), use_seedable_sampler=True
    )
    assert torch.equal(torch.cat([x for (x,) in in_order(loader)]), DATA.tensors[0])
