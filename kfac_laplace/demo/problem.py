"""What all methods of the classification half share under one seed."""

from dataclasses import dataclass

from torch import nn

from kfac_laplace.demo.data import Batches, Images, Split, loader
from kfac_laplace.demo.models import IMAGE_MODELS, seeded
from kfac_laplace.demo.settings import Recipe, Settings


@dataclass(frozen=True)
class Problem:
    """What all methods share under one seed: network, data, initial weights, order of batches."""

    name: str
    data: Images
    settings: Settings
    seed: int

    @property
    def recipe(self) -> Recipe:
        """How this network is trained."""
        return self.settings.images[self.name]

    @property
    def held_out(self) -> Split:
        """Training images on which something is chosen, the same for all methods."""
        return self._cut[0]

    @property
    def kept(self) -> Split:
        """The training images without those."""
        return self._cut[1]

    @property
    def _cut(self) -> tuple[Split, Split]:
        return self.data.train.cut(round(self.settings.holdout * len(self.data.train.x)))

    def network(self) -> nn.Module:
        """A fresh network with this seed's initial weights."""
        return seeded(IMAGE_MODELS[self.name], self.seed, self.settings.device)


def in_order(problem: Problem) -> Batches:
    """The training images in one batch."""
    return loader(problem.data.train, batch_size=len(problem.data.train.x))
