"""Where hyperparameters begin, and when they move: when the training loss has settled.

A network that has not learned yet determines little, so that the evidence asks for strong priors,
under which it learns the less. How far it has come is seen by the loss that the caller computes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: Weight decay of the loss of one example, with which training begins.
DECAY = 1e-4
#: The latest part of the epochs, in which a settled loss has next to nothing left to gain.
LATEST = 0.2
#: Share of all that was gained so far, in the latest part, below which a loss has settled.
LITTLE = 0.03
#: Share of what there is to gain that has to be gained: a plateau at the start is no end.
LEARNED = 0.05
#: Epochs before which no loss has settled.
FEWEST = 5
#: Epochs from which a loss has settled that is flat, whatever was learned: plateaus end before.
LONG = 50
#: Change between its last two quarters, beside what there is to gain, below which it is flat.
FLAT = 0.01


class AtMost(float):
    """The largest δ with which training begins: few data begin with less, a common weight decay."""

    def start(self, n_data: int) -> float:
        """δ with which training on so many examples begins."""
        return min(float(self), DECAY * n_data)


BEGINNING = AtMost(1.0)


@dataclass(frozen=True)
class BurnIn:
    """The training loss, as a mean for each epoch, until it has settled.

    It is the negative log-likelihood, and with Gaussian noise the sum of squared residuals, which
    does not move with σ.

    Args:
        epochs: the means so far, none after it has settled.
        sums: of the loss over the examples of the present epoch, and their number, float64 (2,) on
            the model's device.
        over: whether the loss has settled.
    """

    epochs: tuple[float, ...] = ()
    sums: Tensor | None = None
    over: bool = False

    def with_batch(self, mean: Tensor, n: int) -> "BurnIn":
        """With a batch more; the device is not waited for. Batches of no finite loss do not count.

        Args:
            mean: mean loss of its examples.
            n: their number.
        """
        if self.over:
            return self
        own = n * torch.stack([mean.detach().double(), torch.ones_like(mean, dtype=torch.float64)])
        own = torch.where(own[0].isfinite(), own, 0.0)
        return replace(self, sums=own if self.sums is None else self.sums.to(own.device) + own)

    def ended(self) -> "BurnIn":
        """After the present epoch, which is none where no batch was seen in it."""
        if self.sums is None:
            return self
        total, count = self.sums.tolist()
        epochs = (*self.epochs, total / count) if count else self.epochs
        return replace(self, epochs=epochs, sums=None)

    def judged(self, constant: float) -> "BurnIn":
        """Over, where the loss has settled.

        Args:
            constant: the loss of the best constant prediction; NaN where it is not known.
        """
        settled = not self.over and has_settled(self.epochs, constant)
        return BurnIn(over=True) if settled else self

    @property
    def waits(self) -> bool:
        """Whether a loss was seen that has not settled yet."""
        return bool(self.epochs) and not self.over


def has_settled(losses: Sequence[float], constant: float = math.nan) -> bool:
    """Whether a loss gained hardly anything in its latest fifth, beside all that it gained.

    All that it gained is what it is better than a constant prediction, and where that is not known
    than it was at first. The span grows with time, so that the same curve over more epochs settles
    at the same place. A loss that is flat for long has settled too: there is nothing to learn.

    Args:
        losses: one value an epoch.
        constant: the loss of the best constant prediction, ≥ 0; NaN where it is not known.
    """
    span = math.ceil(LATEST * len(losses))
    if len(losses) < FEWEST or span >= len(losses):
        return False
    reference = constant if math.isfinite(constant) else losses[0]
    gained, lately = reference - losses[-1], losses[-1 - span] - losses[-1]
    if gained > LEARNED * abs(reference) and lately < LITTLE * gained:
        return True
    quarter = len(losses) // 4
    before, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    change = abs(sum(before) - sum(last)) / quarter
    return len(losses) >= LONG and change < FLAT * abs(reference)
