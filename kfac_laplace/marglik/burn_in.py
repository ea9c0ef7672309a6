"""Where hyperparameters begin, and when they move: when the training loss has settled.

A network that has not learned yet determines little, so that the evidence asks for strong priors,
under which it learns the less. How far it has come is seen by the loss that the caller computes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

#: Weight decay of the loss of one example, with which training begins.
DECAY = 1e-4
#: The latest part of the epochs, in which a settled loss has next to nothing left to gain.
LATEST = 0.2
#: Share of all that was gained so far, in the latest part, below which a loss has settled.
LITTLE = 0.03
#: Share of its first value that a loss has to have lost: a plateau at the start is no end.
LEARNED = 0.1
#: Epochs before which no loss has settled.
FEWEST = 5


class AtMost(float):
    """The largest δ with which training begins: few data begin with less, a common weight decay."""

    def start(self, n_data: int) -> float:
        """δ with which training on so many examples begins."""
        return min(float(self), DECAY * n_data)


BEGINNING = AtMost(1.0)


@dataclass(frozen=True)
class BurnIn:
    """The training loss, as a mean for each epoch, until it has settled.

    Args:
        epochs: the means so far, none after it has settled.
        total: sum over the examples of the present epoch, float64, on the model's device.
        count: number of these examples.
        over: whether the loss has settled.
    """

    epochs: tuple[float, ...] = ()
    total: Tensor | None = None
    count: int = 0
    over: bool = False

    def with_batch(self, mean: Tensor, n: int) -> "BurnIn":
        """With a batch more; the device is not waited for.

        Args:
            mean: mean negative log-likelihood of its examples.
            n: their number.
        """
        if self.over:
            return self
        own = mean.detach().double() * n
        total = own if self.total is None else self.total.to(own.device) + own
        return replace(self, total=total, count=self.count + n)

    def ended(self) -> "BurnIn":
        """After the present epoch, which is none where no batch was seen in it."""
        if self.total is None:
            return self
        epochs = (*self.epochs, float(self.total) / self.count)
        return BurnIn(over=True) if has_settled(epochs) else BurnIn(epochs)

    @property
    def waits(self) -> bool:
        """Whether a loss was seen that has not settled yet; one epoch alone shows no trend."""
        return len(self.epochs) > 1 and not self.over


def has_settled(losses: Sequence[float]) -> bool:
    """Whether a loss gained hardly anything in its latest fifth, beside all that it gained.

    The span grows with time, so that the same curve over more epochs settles at the same place.

    Args:
        losses: one value an epoch.
    """
    span = math.ceil(LATEST * len(losses))
    if len(losses) < FEWEST or span >= len(losses):
        return False
    gained, lately = losses[0] - losses[-1], losses[-1 - span] - losses[-1]
    return gained > LEARNED * abs(losses[0]) and lately < LITTLE * gained
