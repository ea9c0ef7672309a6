"""A tuner at work in a framework's loop: what the callbacks of all frameworks share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.integrations.prior_gradients import PriorGradients, Targets
from kfac_laplace.integrations.training_data import TrainingData
from kfac_laplace.laplace import Laplace
from kfac_laplace.marglik.record import Record
from kfac_laplace.marglik.tuner import MarglikTuner

#: What looks at the history after each round.
Watch = Callable[[Sequence[Record]], Any]


class TunedTraining:
    """Rounds at the end of epochs, and the prior's gradient in between.

    Args:
        tuner: the tuner.
        data: what its rounds read.
        targets: finds those of a batch that the model was called with.
        pass_every: where the tuner has an optimiser's curvature, of how many rounds one passes over
            the data.
        watch: called with the history after each round, by the first rank.
    """

    def __init__(
        self,
        tuner: MarglikTuner,
        data: TrainingData,
        targets: Targets,
        pass_every: int,
        watch: Watch | None,
    ):
        self.tuner, self.data = tuner, data
        self.prior = PriorGradients(tuner, targets)
        self._pass_every, self._watch = pass_every, watch
        #: the last that ended
        self.epoch = 0

    def end_epoch(self, epoch: int) -> Record | None:
        """The round after an epoch, counted from 1; nothing where it was made before.

        Several ranks go on from the first one's.

        Raises:
            InvalidValue: the losses of the epoch were not those of the likelihood.
        """
        if epoch <= self.epoch:
            return None
        self.prior.check()
        return self._ended(epoch)

    def catch_up(self, ended: int) -> Record | None:
        """The round of an epoch at whose end training was saved before the round was made."""
        return self._ended(ended) if 0 < ended == self.epoch + 1 else None

    def _ended(self, epoch: int) -> Record | None:
        record = self._round(epoch)
        self.epoch = epoch
        first = of_first_rank(self.tuner)
        if record is not None and self._watch is not None and first:
            self._watch(self.tuner.history)
        return record

    def _round(self, epoch: int) -> Record | None:
        tuner = self.tuner
        if tuner.curvature is not None and len(tuner.history) % self._pass_every:
            try:
                return tuner.step(epoch=epoch)
            except (InvalidValue, NotFitted):  # other parameters, an epoch without a loss
                pass
        return tuner.step(self.data.loader, epoch)

    def posterior(self) -> Laplace:
        """A posterior at the present weights, by a pass over the data."""
        return self.tuner.laplace(self.data.loader)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        return {"tuner": self.tuner.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; `InvalidValue` where it is none of such a tuner."""
        self.tuner.load_state_dict(state["tuner"])
        self.epoch = state["epoch"]


def of_first_rank(tuner: MarglikTuner) -> bool:
    """Have all ranks go on from the tuner of the first, which the last digits may tell apart.

    Returns:
        Whether this is the first.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    if distributed.get_world_size() > 1:
        state = [tuner.state_dict()]
        distributed.broadcast_object_list(state, src=0, device=_device_for_ranks())
        tuner.load_state_dict(state[0])
    return distributed.get_rank() == 0


def _device_for_ranks() -> torch.device:
    """Where objects travel between ranks: NCCL knows GPUs alone."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise `InvalidType` for options of a tuner that the loop decides."""
    for name in ("loss_units", "curvature"):
        if name in options:
            raise InvalidType(
                "not an option of this callback: the loss has the units of the training loop, and "
                "the curvature of a KFAC is taken where it is the optimiser",
                where=name,
                got=repr(options[name]),
                remedy="Leave it out",
            )
    if options.get("process_group") is not None:
        raise InvalidType(
            "not an option of this callback: each rank's rounds read all of the data",
            where="process_group",
            got=repr(options["process_group"]),
            remedy="Leave it out, or tune in a loop of your own by MarglikTuner(process_group=...)",
        )
