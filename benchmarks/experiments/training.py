"""The training loop of the image experiments: a cosine, with a weight decay or with a tuner."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.clock import Clock
from kfac_laplace import MarglikTuner
from kfac_laplace.demo.data import Split

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def adam(learning_rate: float) -> Callable[[nn.Module, float], Optimizer]:
    """Adam at a rate."""

    def make(model: nn.Module, weight_decay: float) -> Optimizer:
        return torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)

    return make


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, whatever the method.

    Args:
        epochs: passes over the training images.
        optimizer: made of the network and a weight decay; its rate goes to zero on a cosine.
        augment: changes images at random, anew in each epoch; None leaves them.
        batch: examples in a mini-batch.
        order: seed of the order of batches, and of the augmentation.
    """

    epochs: int
    optimizer: Callable[[nn.Module, float], Optimizer]
    augment: Augmentation | None
    order: int
    batch: int = 50


@dataclass(frozen=True)
class Fit:
    """A trained network, in evaluation mode, and what it cost.

    Args:
        model: the network.
        weight_decay: λ of the loss, mean + λ/2 ‖θ‖²; None where a tuner chose.
        tuner: that tuner.
        costs: seconds of all training runs that led to it, and of the rounds within.
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
        (x, y), augment = self.data, self.recipe.augment
        order = torch.randperm(len(y), generator=self._order).to(y.device)
        for picked in order.split(self.recipe.batch):
            yield augment(x[picked], self._draws) if augment else x[picked], y[picked]


@dataclass(frozen=True)
class Rounds:
    """What rounds of the tuner read: all training images, as training sees them.

    Every pass of one epoch sees the same draws of the augmentation.

    Args:
        data: training images on the device.
        augment: changes them at random; None leaves them.
        seed: of the draws.
        batch: examples at once.
    """

    data: Split
    augment: Augmentation | None = None
    seed: int = 0
    batch: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for x, y in zip(*(tensor.split(self.batch) for tensor in self.data), strict=True):
            yield self.augment(x, generator) if self.augment else x, y


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
    clock, rounds = Clock(str(data.x.device)), 0.0
    loss = tuner.loss if tuner else F.cross_entropy
    optimizer = recipe.optimizer(model, weight_decay)
    schedule, epochs = CosineAnnealingLR(optimizer, recipe.epochs), Epochs(data, recipe)
    model.train()
    for epoch in range(1, recipe.epochs + 1):
        for x, y in epochs.batches():
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        schedule.step()
        if tuner:
            paused = Clock(str(data.x.device))
            tuner.step(Rounds(data, recipe.augment, recipe.order + epoch), epoch=epoch)
            rounds += paused()["seconds"]
    model.eval()
    costs = clock() | ({"round_cpu_seconds": rounds} if tuner else {})
    return Fit(model, None if tuner else weight_decay, tuner, costs)
