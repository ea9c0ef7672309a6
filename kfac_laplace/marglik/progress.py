"""What the losses of training show: how far it has come, and in which modes it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.unchanged import device_of
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.marglik.burn_in import BurnIn
from kfac_laplace.marglik.live import first_entries
from kfac_laplace.marglik.shared import EpochFit
from kfac_laplace.marglik.training_mode import modes_of


@dataclass(frozen=True)
class Progress:
    """What was seen in the losses of training.

    Args:
        burn_in: how far the training loss has settled.
        outputs: of an example, None where no loss was computed.
        then: first entries of the weights at the epoch's first loss.
        modes: of the modules, in training; none where none was seen.
        fit: of the present epoch, for rounds without a pass.
        epoch: number of the last epoch.
        left_start: whether precisions have left their start.
    """

    burn_in: BurnIn
    outputs: int | None = None
    then: Tensor | None = None
    modes: Mapping[nn.Module, bool] = field(default_factory=dict)
    fit: EpochFit = field(default_factory=EpochFit)
    epoch: int = 0
    left_start: bool = False

    def with_batch(
        self, model: nn.Module, output: Tensor, measure: Tensor, statistic: Tensor | None
    ) -> "Progress":
        """With a training batch more; the device is not waited for.

        Args:
            model: the model.
            output: what it returned.
            measure: `unexplained` of the batch.
            statistic: the likelihood's sum over it, None where no round goes by it.
        """
        n, then = len(output), self.then
        if self.burn_in.sums is None and not self.burn_in.over:
            then = first_entries(model)
        return replace(
            self,
            burn_in=self.burn_in.with_batch(measure, n),
            outputs=output.numel() // n,
            then=then,
            modes=self.modes or modes_of(model),
            fit=self.fit if statistic is None else self.fit.with_batch(statistic, n),
        )

    def of_all(self, ranks: Ranks | None, model: nn.Module) -> "Progress":
        """What the losses of all processes show, of which each trains on a part of the data.

        Args:
            ranks: the processes, all of which come here; None: this one alone.
            model: the model.
        """
        if ranks is None:
            return self
        sums = self.burn_in.sums, self.fit.statistic, self.fit.rows
        told = ranks.gathered(
            lambda: (
                [None if one is None else one.cpu() for one in sums],
                (self.outputs, None if self.then is None else self.then.cpu(), self._flags),
            )
        )
        device = device_of(model)
        totals = [_total(parts, device) for parts in zip(*(one for one, _ in told), strict=True)]
        outputs, then, flags = (
            next((each for each in seen if each is not None), None)
            for seen in zip(*(other for _, other in told), strict=True)
        )
        return replace(
            self,
            burn_in=replace(self.burn_in, sums=totals[0]),
            outputs=outputs,
            then=None if then is None else then.to(device),
            modes={} if flags is None else dict(zip(model.modules(), flags, strict=True)),
            fit=EpochFit(totals[1], totals[2]),
        )

    @property
    def _flags(self) -> tuple[bool, ...] | None:
        """Modes without the modules; None where none was seen."""
        return tuple(self.modes.values()) or None

    def ended(self, model: nn.Module, epoch: int) -> "Progress":
        """After an epoch, of this number. Losses between which no weight moved are no training."""
        moved = self.then is None or not torch.equal(self.then, first_entries(model))
        burn_in = self.burn_in.ended() if moved else replace(self.burn_in, sums=None)
        return replace(self, burn_in=burn_in, fit=EpochFit(), epoch=epoch)


def _total(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """The sum of those that are there, in their order."""
    found = [part.to(device) for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None
