"""What is learned: data that batches are picked from, a network, and how large both are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.experiments.training import Augmentation

#: Examples that are evaluated at once.
AT_ONCE = 500


@dataclass(frozen=True)
class Size:
    """What makes a task larger or smaller.

    Args:
        steps: of the full horizon.
        batch: examples in a step.
        every: steps between two evaluations.
        train: examples to learn from.
        held_out: examples to validate on, and as many again to test on.
        width: of the network, in the task's own units.
        depth: of the network, likewise.
        side: of an example: pixels of an image, most nodes of a graph, characters of a text.
    """

    steps: int
    batch: int
    every: int
    train: int
    held_out: int
    width: int
    depth: int
    side: int


class Examples(Protocol):
    """Labelled examples on a device."""

    def __len__(self) -> int:
        """How many."""
        ...

    def pick(self, index: Tensor, draws: Generator | None = None) -> tuple[Any, Tensor]:
        """The inputs and labels of some.

        Args:
            index: which ones, on the CPU.
            draws: of the augmentation; None leaves the inputs as they are.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Examples that are rows of a tensor.

    Args:
        x: inputs (n, ...).
        y: labels (n,), or (n, t) with one at each position.
        augment: changes picked inputs at random.
    """

    x: Tensor
    y: Tensor
    augment: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.y)

    def pick(self, index: Tensor, draws: Generator | None = None) -> tuple[Tensor, Tensor]:
        """See `Examples.pick`."""
        index = index.to(self.y.device)
        x = self.x[index]
        return self.augment(x, draws) if self.augment and draws else x, self.y[index]


class Data(NamedTuple):
    """Examples to learn from, to choose settings on, and to compare methods on."""

    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Args:
        about: a line for the report: data, network, where they come from.
        sizes: by the kind of device that they are meant for, "cpu" and "gpu".
        data: made of a size, a device and the folder of data files; always the same.
        network: made of a size, its weights by the global generator.
        measure: what a target is set for, "accuracy" or "nll".
    """

    about: str
    sizes: dict[str, Size]
    data: Callable[[Size, str, Path | None], Data]
    network: Callable[[Size], nn.Module]
    measure: str = "accuracy"


def mean_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over examples and positions.

    Args:
        outputs: class scores (n, c) or (n, t, c).
        labels: (n,) or (n, t).
    """
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def batches(examples: Examples, size: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Mini-batches without end, each pass in an order of its own; what is left of one is dropped.

    Args:
        examples: to pick from.
        size: of a batch, at most all of them.
        seed: of the orders and of the augmentation.
    """
    order, draws = (Generator().manual_seed(seed) for _ in range(2))
    size = min(size, len(examples))
    while True:
        for index in torch.randperm(len(examples), generator=order).split(size):
            if len(index) == size:
                yield examples.pick(index, draws)


@torch.no_grad()
def evaluated(model: nn.Module, examples: Examples) -> dict[str, float]:
    """Accuracy, and mean negative log-likelihood in nats; leaves the model in training mode."""
    model.eval()
    right, loss, count = 0.0, 0.0, 0
    for index in torch.arange(len(examples)).split(AT_ONCE):
        x, y = examples.pick(index)
        outputs = model(x)
        right += float((outputs.argmax(-1) == y).sum())
        loss += float(mean_loss(outputs, y)) * y.numel()
        count += y.numel()
    model.train()
    return {"accuracy": right / count, "nll": loss / count}
