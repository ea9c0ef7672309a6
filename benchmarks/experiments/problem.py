"""What all methods of a cell share, and the networks that several of them start from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments import settings
from benchmarks.experiments.augmentation import augmented
from benchmarks.experiments.data import Images, images
from benchmarks.experiments.measures import logits_of
from benchmarks.experiments.networks import NETWORKS, seeded
from benchmarks.experiments.training import Fit, Recipe, adam, train
from kfac_laplace.demo.data import Split


@dataclass(frozen=True)
class Problem:
    """A network on a training set under a seed.

    The split, the initial weights and the order of batches depend on data, size and seed alone, so
    that methods are compared in pairs.

    Args:
        network: name of a network.
        data: "digits" or "mnist".
        size: training images.
        augment: rotate and shift them at random.
        seed: of all that is drawn.
        epochs: passes over the training images.
        tests: how many images are predicted.
        device: where.
        folder: of mnist.npz.
    """

    network: str
    data: str
    size: int
    augment: bool
    seed: int
    epochs: int
    tests: settings.Counts
    device: str
    folder: Path | None

    @cached_property
    def images(self) -> Images:
        """The images, on the device."""
        tests = (self.tests.mode, self.tests.posterior)
        train, test, *others = images(self.data, self.size, self.seed, tests, self.folder)
        x, y = train
        train = Split(x.to(self.device), y.to(self.device))
        test = Split(test.x.to(self.device), test.y.to(self.device))
        return Images(train, test, *(None if x is None else x.to(self.device) for x in others))

    @property
    def held_out(self) -> tuple[Split, Split]:
        """A fifth of the training images, and the others."""
        return self.images.train.cut(round(settings.HELD_OUT * self.size))

    def model(self, member: int = 0) -> nn.Module:
        """A fresh network; other members of an ensemble have other initial weights."""
        side = self.images.train.x.shape[-1]
        return seeded(lambda: NETWORKS[self.network](side), self.seed + 1000 * member, self.device)

    def recipe(self, member: int = 0) -> Recipe:
        """How the network is trained."""
        return Recipe(
            epochs=self.epochs,
            optimizer=adam(settings.LEARNING_RATE[self.network]),
            augment=augmented if self.augment else None,
            order=self.seed + 1000 * member,
        )

    def plainly(self, data: Split, weight_decay: float, member: int = 0) -> Fit:
        """A training run with a weight decay."""
        return train(self.model(member), data, self.recipe(member), weight_decay=weight_decay)

    @cached_property
    def plain(self) -> Fit:
        """Plain training on all images, which several methods start from."""
        return self.plainly(self.images.train, settings.PLAIN)

    @cached_property
    def partly(self) -> Fit:
        """Plain training without the images held out."""
        return self.plainly(self.held_out[1], settings.PLAIN)


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T in [1/20, 20] at which softmax(f/T) has the least negative log-likelihood.

    It is convex in 1/T, whose derivative is brought to zero by bisection.

    Args:
        logits: f, shape (n, c).
        labels: (n,).
    """
    low, high = 0.05, 20.0
    for _ in range(50):
        middle = (low * high) ** 0.5
        beta = torch.tensor(middle, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(logits.double().cpu() * beta, labels.cpu()).backward()
        low, high = (low, middle) if beta.grad > 0 else (middle, high)  # type: ignore[operator]
    return (low * high) ** -0.5


def temperature_of(fit: Fit, held_out: Split) -> float:
    """The temperature of a network on images that it was not trained on."""
    return best_temperature(logits_of(fit.model, held_out.x), held_out.y)
