"""The training loop of the experiments: Adam on a cosine, with a weight decay or with a tuner."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.augmentation import augmented
from benchmarks.experiments.clock import Clock
from kfac_laplace import MarglikTuner
from kfac_laplace.demo.data import Split


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the method.

    Args:
        epochs: passes over the training images.
        learning_rate: where Adam's cosine starts; it ends at zero.
        augment: rotate and shift images at random, anew in each epoch.
        batch: examples in a mini-batch.
        order: seed of the order of batches, and of the augmentation.
    """

    epochs: int
    learning_rate: float
    augment: bool
    order: int
    batch: int = 50


@dataclass(frozen=True)
class Fit:
    """A trained network, in evaluation mode, and what it cost.

    Args:
        model: the network.
        weight_decay: λ of the loss, mean + λ/2 ‖θ‖²; None where a tuner chose.
        tuner: that tuner.
        costs: seconds of all training runs that led to it.
    """

    model: nn.Module
    weight_decay: float | None = None
    tuner: MarglikTuner | None = None
    costs: dict[str, float] = field(default_factory=dict)


class Epochs:
    """The training images of each epoch, in an order of their own and augmented.

    Args:
        data: training images on the device.
        recipe: how to train.
    """

    def __init__(self, data: Split, recipe: Recipe):
        self.data, self.recipe = data, recipe
        self._order = torch.Generator().manual_seed(recipe.order)
        self._draws = torch.Generator().manual_seed(recipe.order)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of the next epoch."""
        x, y = self.data
        order = torch.randperm(len(y), generator=self._order).to(y.device)
        for picked in order.split(self.recipe.batch):
            yield augmented(x[picked], self._draws) if self.recipe.augment else x[picked], y[picked]


@dataclass(frozen=True)
class Rounds:
    """What rounds of the tuner read: all training images, as training sees them.

    Every pass of one epoch sees the same draws of the augmentation.

    Args:
        data: training images on the device.
        augment: rotate and shift them.
        seed: of the draws.
        batch: examples at once.
    """

    data: Split
    augment: bool
    seed: int
    batch: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for x, y in zip(*(tensor.split(self.batch) for tensor in self.data), strict=True):
            yield augmented(x, generator) if self.augment else x, y


def train(
    model: nn.Module,
    data: Split,
    recipe: Recipe,
    *,
    weight_decay: float = 0.0,
    tuner: MarglikTuner | None = None,
) -> Fit:
    """Train a classifier, on the tuner's loss where there is one.

    Args:
        model: changed in place.
        data: training images on its device.
        recipe: how.
        weight_decay: λ; 0 with a tuner.
        tuner: rounds take place after epochs.
    """
    clock = Clock(str(data.x.device))
    loss = tuner.loss if tuner else F.cross_entropy
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=weight_decay
    )
    schedule, epochs = CosineAnnealingLR(optimizer, recipe.epochs), Epochs(data, recipe)
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        for x, y in epochs.batches():
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        schedule.step()
        if tuner:
            tuner.step(Rounds(data, recipe.augment, recipe.order + epoch), epoch=epoch)
    model.eval()
    return Fit(model, None if tuner else weight_decay, tuner, clock())
