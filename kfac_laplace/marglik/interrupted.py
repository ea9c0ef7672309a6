"""Training that a killed process goes on with: all that changes between two steps, in a file."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from typing_extensions import Self

from kfac_laplace.curvature.batch_digest import digest
from kfac_laplace.curvature.checkpoint import Checkpoint, Clock
from kfac_laplace.curvature.model.draws import Draws
from kfac_laplace.curvature.model.random_states import RandomStates
from kfac_laplace.curvature.model.unchanged import device_of
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.same_fit import REMEDY
from kfac_laplace.curvature.termination import Termination
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.files import check_writable, read, rewrite
from kfac_laplace.states.plain import check_plain, check_seal, same, sealed
from kfac_laplace.states.stored import FORMAT, Stored, opened, refusing_damage

log = logging.getLogger("kfac_laplace")

KIND = "a checkpoint of training"
KEYS = ("training", "parts", "made", "best", "draws")


class Part(Protocol):
    """What has a state: a model, an optimiser, a schedule, a tuner."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and plain data."""
        ...

    def load_state_dict(self, state: Any) -> Any:
        """Take them over."""
        ...


@dataclass
class Reached:
    """How far training has come.

    Args:
        epoch: from 1.
        digests: of the batches of this epoch that steps were made of.
        total: sum of their losses over examples.
        seen: number of these examples.
        losses: mean losses of the epochs before.
    """

    epoch: int = 1
    digests: list[int] = field(default_factory=list)
    total: float = 0.0
    seen: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float, examples: int) -> None:
        """Count a step."""
        self.total += loss * examples
        self.seen += examples

    def end(self, ranks: Ranks | None = None) -> None:
        """Begin the next epoch; the loss of this one is that of all processes."""
        own = self.total, self.seen
        told = [own] if ranks is None else ranks.gathered(lambda: own)
        self.losses.append(sum(loss for loss, _ in told) / max(1, sum(n for _, n in told)))
        self.epoch, self.digests, self.total, self.seen = self.epoch + 1, [], 0.0, 0


class Training:
    """A loop over epochs whose state is written between steps; without a checkpoint it is not.

    Args:
        checkpoint: where to write; `every` counts steps.
        model: the network, whose state is taken over last.
        parts: what else changes, by name: a part that refuses a state leaves all as it was.
        made: plain data that have to be the same when training goes on.
        loader: the data.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        model: nn.Module,
        parts: Mapping[str, Part],
        made: Mapping[str, Any],
        loader: Iterable[Any],
    ):
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        self._checkpoint, self._loader, self._model = checkpoint, loader, model
        self._parts: dict[str, Part] = {**parts, "model": model}
        self._made = {**made, "model": shapes}
        self._around, self._termination = ExitStack(), Termination()
        self._clock = Clock()
        # States of generators before the epoch's first batch, and after its last step so far.
        self._start: dict[str, Any] = {}
        self._now: dict[str, Any] = {}
        self._resumes = self._unwritten = False
        self.reached = Reached()
        #: States of the round to return to, None where the last weights are wanted.
        self.best: dict[str, Any] | None = None

    def epochs(self, count: int) -> range:
        """Numbers of the epochs that are left.

        Raises:
            InvalidValue: training has gone beyond that.
        """
        if self.reached.epoch > max(1, count):
            raise InvalidValue(
                "the checkpoint is of a longer training",
                where="n_epochs",
                got=f"{count}, where epoch {self.reached.epoch} has begun",
                remedy=f"Ask for as many or more. {REMEDY}",
            )
        return range(self.reached.epoch, count + 1)

    def __enter__(self) -> Self:
        """Read the file, if there is one, and take over what it holds."""
        if self._checkpoint is not None:
            check_writable(self._checkpoint.path)
            check_plain(self._states())  # before hours of training, not after
            if os.path.exists(self._checkpoint.path):
                self._take(self._checkpoint)
            self._around.enter_context(self._termination)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put handlers back, and write the end where it is to be kept."""
        with self._around:
            if error is None and self._checkpoint is not None and self._checkpoint.keep:
                self._start = self._now = self._draws().to_plain()
                self._unwritten = True
                self._write()

    def new_batches(self) -> Iterator[Any]:
        """The epoch's batches of which no step was made yet; each step ends with the next one."""
        if self._checkpoint is None:
            yield from self._loader
            return
        before, draws = len(self.reached.digests), self._draws()
        if self._resumes:
            draws.put(*_states(self._start, draws.device))
        else:
            self._start = self._now = draws.to_plain()
        number = 0
        for number, batch in enumerate(self._watched(self._loader), 1):
            mark = digest(batch)
            if number <= before:
                if mark != self.reached.digests[number - 1]:
                    raise _other_data(self._checkpoint, f"batch {number} of other content")
                if number == before:
                    draws.put(*_states(self._now, draws.device))
                continue
            yield batch
            self.reached.digests.append(mark)
            self._now, self._unwritten = self._draws().to_plain(), True
            if self._clock.is_time(self._checkpoint.every, len(self.reached.digests)):
                self._write()
        if number < before:
            raise _other_data(self._checkpoint, f"{number} batches, where {before} were trained on")
        self._resumes = False

    def data(self) -> Iterable[Any]:
        """The loader for a round; where SIGTERM comes, the steps before it are written."""
        return self._loader if self._checkpoint is None else _Watched(self)

    def watched(self) -> Iterator[Any]:
        """Its batches."""
        return self._watched(self._loader)

    def _watched(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Between batches all is whole: what is unwritten is written before an end."""
        iterator = iter(batches)
        while True:
            try:
                self._end_if_due()
                batch = next(iterator)
                self._end_if_due()
            except StopIteration:
                return
            except BaseException:
                self._write()
                raise
            yield batch

    def _end_if_due(self) -> None:
        if self._termination.due:
            self._write()
            self._termination.deliver()

    def _draws(self) -> Draws:
        return Draws(device_of(self._model), self._loader)

    def _states(self) -> dict[str, Any]:
        return {name: dict(part.state_dict()) for name, part in self._parts.items()}

    def _write(self) -> None:
        """Write the state after the last step, unless it stands in the file."""
        if self._checkpoint is None or not self._unwritten:
            return
        reached = asdict(self.reached)
        content = {
            "format": FORMAT,
            "training": {
                **reached,
                "digests": torch.tensor(reached["digests"], dtype=torch.int64, device="cpu"),
            },
            "parts": self._states(),
            "made": self._made,
            "best": self.best,
            "draws": [self._start, self._now],
        }
        with self._clock.writing():
            rewrite(sealed(content), self._checkpoint.path)
        self._unwritten = False

    def _take(self, checkpoint: Checkpoint) -> None:
        """Take over a file's content, or nothing.

        Raises:
            InvalidValue: a damaged file, or one of another training.
        """
        state = read(checkpoint.path)
        with refusing_damage("checkpoint"):
            found = opened(state, KEYS, KIND)
            check_seal(state, "checkpoint")
            for name, mine in self._made.items():
                if not same(state["made"].get(name), mine):
                    raise InvalidValue(
                        "the checkpoint is of another training", where=name, remedy=REMEDY
                    )
            own = found["training"].items()
            digests = own["digests"].value.tolist()
            reached = {**{name: one.value for name, one in own.items()}, "digests": digests}
            for name, part in self._parts.items():  # the model last
                part.load_state_dict(state["parts"][name])
        self.reached, self.best = Reached(**reached), state["best"]
        self._start, self._now = state["draws"]
        self._resumes = True
        log.info(
            "%s: going on after %d steps of epoch %d",
            checkpoint.path,
            len(digests),
            self.reached.epoch,
        )


class _Watched:
    """A loader that may be read more than once.

    Args:
        training: whose it is.
    """

    def __init__(self, training: Training):
        self._training = training

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        return self._training.watched()


def _states(plain: Any, device: torch.device) -> tuple[RandomStates, list[torch.Tensor]]:
    found = Stored(plain, "state.draws").fields(("states", "loader"))
    states = RandomStates.from_plain(found["states"].value, device)
    return states, [one.value for one in found["loader"].entries()]


def _other_data(checkpoint: Checkpoint, got: str) -> InvalidValue:
    return InvalidValue(
        f"the data are not those of the training in {checkpoint.path}",
        where="train_loader",
        got=got,
        remedy=f"A loader that shuffles has to be made as it was, its generator too. {REMEDY}",
    )
