"""Passes over the data that a killed process goes on with: what was counted, in a file."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.batch_digest import digest
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.live_state import live_from_plain, live_to_plain
from kfac_laplace.curvature.model.draws import Draws, generators_of
from kfac_laplace.curvature.model.random_states import RandomStates
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.same_fit import REMEDY, Counting, bound_to, check_bound
from kfac_laplace.curvature.termination import Termination
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.options import check_whole
from kfac_laplace.process import draws_kept
from kfac_laplace.states.files import beside, check_writable, read, rewrite
from kfac_laplace.states.plain import check_seal, sealed
from kfac_laplace.states.stored import FORMAT, Stored, opened, refusing_damage

log = logging.getLogger("kfac_laplace")

#: A pass is written after so many seconds, or so many times what the last write took.
SECONDS = 10.0
TIMES = 50
#: "ekfac" makes two passes: of its factors, and of its own blocks.
Phase = Literal["factors", "own"]
PHASES: tuple[Phase, ...] = ("factors", "own")
#: What a file holds beside its format and its checksum.
KEYS = ("pass", "bound", "curvature", "draws")
KIND = "a checkpoint of a fit"


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit keeps what it has counted, so that a process that died loses next to nothing.

    Called again with the same model, data and options, the fit goes on after the last batch in the
    file, and its result is bit by bit that of the fit without interruption. `marglik_training` goes
    on after the last step in it.

    Args:
        path: of the file, which is replaced as a whole.
        every: batches (of training: steps) from one write to the next. None: by the clock, after
            ten seconds or fifty times what a write takes, whichever is longer: writing costs 2 % at
            most.
        keep: leave the file when the fit has ended; by default it is removed.

    Raises:
        InvalidType: not a path, not a whole number, neither True nor False.
        InvalidValue: `every` below 1.
    """

    path: str | Path
    every: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        """Check each option."""
        if not isinstance(self.path, str | Path) or not os.fspath(self.path):
            raise InvalidType("not a path", where="checkpoint", got=repr(self.path))
        if self.every is not None:
            check_whole("every", self.every, 1)
        if not isinstance(self.keep, bool):
            raise InvalidType("neither True nor False", where="keep", got=repr(self.keep))

    @classmethod
    def of(
        cls, given: "Checkpoint | str | Path | None", ranks: Ranks | None = None
    ) -> "Checkpoint | None":
        """What users pass: a path stands for a checkpoint of the defaults.

        Args:
            given: that.
            ranks: where several processes read, each writes a file of its own: the path with its
                rank behind it.
        """
        made = given if given is None or isinstance(given, cls) else cls(given)  # type: ignore[arg-type]
        ending = "" if ranks is None else f".{ranks.rank}of{ranks.size}"
        if made is None or os.fspath(made.path).endswith(ending):
            return made
        return replace(made, path=f"{os.fspath(made.path)}{ending}")

    def remove(self) -> None:
        """Remove the file, and what a kill in the middle of a write left, where there are any."""
        for path in (os.path.realpath(self.path), beside(self.path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def ended(self) -> None:
        """The fit is there: the file goes, unless it is to be kept."""
        if not self.keep:
            self.remove()


@dataclass(frozen=True)
class Found:
    """What a file holds of a pass.

    Args:
        phase: which pass.
        digests: of the batches that were counted.
        start: global random states before the first, and those of the loader.
        live: the sums so far, as they were written.
        draws: state of the source of labels and signs.
    """

    phase: Phase
    digests: list[int]
    start: tuple[RandomStates, list[Tensor]]
    live: Stored
    draws: Tensor


class Clock:
    """When to write, by steps or by how long writing takes; what is computed depends on neither."""

    def __init__(self) -> None:
        self._ended, self._took = time.monotonic(), 0.0

    def is_time(self, every: int | None, count: int) -> bool:
        """Whether to write now, after so many batches or steps."""
        if every is not None:
            return count % every == 0
        return time.monotonic() - self._ended >= max(SECONDS, TIMES * self._took)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While it is written."""
        began = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = self._ended - began


class Keeping:
    """The passes of one `read`: which batches are new, and when what was counted is written.

    Without a checkpoint all batches are new, and nothing is written.

    Args:
        checkpoint: where to write.
        of: what counts, before the first batch.
        loader: the data.
        key_y: name of the targets in mappings.
    """

    def __init__(
        self, checkpoint: Checkpoint | None, of: Counting, loader: Iterable[Any], key_y: str
    ):
        self._checkpoint, self._of, self._loader, self._key_y = checkpoint, of, loader, key_y
        self._around, self._termination = contextlib.ExitStack(), Termination()
        self._found: Found | None = None
        self._phase: Phase = "own"
        self._digests: list[int] = []
        self._start: dict[str, Any] = {}
        # Where a file has put others in their place.
        self._before: Draws | None = None
        self._counted_before: tuple[GGN, Tensor] | None = None
        self._last: tuple[GGN, Tensor] | None = None  # after the batches counted so far
        self._written, self._clock = 0, Clock()

    def __enter__(self) -> Self:
        """Read the file, if there is one, and put random states where its pass began."""
        if self._checkpoint is None:
            return self
        path = self._checkpoint.path
        check_writable(path)
        self._bound = bound_to(self._of, self._key_y)
        found = self._opened(path) if os.path.exists(path) else None
        with contextlib.ExitStack() as around:
            around.enter_context(draws_kept())
            if found is not None:
                self._before = Draws(self._of.network.device, self._loader)
                with refusing_damage("checkpoint"):
                    self._before.put(*found.start)
            around.enter_context(self._termination)
            self._around = around.pop_all()
        self._found = found
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write what an error, Ctrl-C or SIGTERM leaves unwritten; handlers are put back."""
        with self._around:
            if error is not None:
                # What it was is told as it is, not that the disk is full as well.
                with contextlib.suppress(Exception):
                    self._write()
                if self._last is None:
                    self._undo()
            elif self._termination.due or (self._checkpoint and self._checkpoint.keep):
                self._write()

    def _undo(self) -> None:
        """Where a file was refused, counts and draws are those without it."""
        if self._before is not None:
            self._before.put_back()
        if self._counted_before is not None:
            self._of.ggn, draws = self._counted_before
            self._of.generator.set_state(draws)

    def past(self, phase: Phase) -> bool:
        """Whether the file is of a later pass, so that this one need not be made."""
        return self._found is not None and PHASES.index(self._found.phase) > PHASES.index(phase)

    def past_factors(self, ranks: Ranks | None) -> bool:
        """Whether the pass of the factors need not be made: on no rank, or on all."""
        past = self.past("factors")
        if ranks is not None and not all(ranks.gathered(lambda: past)) and past:
            self._found, past = None, False  # the bases come out the same again
        return past

    def end_part(self) -> None:
        """Write all that this process has to count, and hold it no longer: others may take time."""
        self._write()
        self._last = None

    def begin(self, phase: Phase, of: Counting) -> int:
        """Begin a pass, and put what was counted of it into `of`; how many batches that are."""
        self._write()  # of an earlier pass
        self._end_if_due()  # the bases between two passes take their time
        self._phase, self._of, self._digests = phase, of, []
        self._last, self._written = None, 0
        found, self._found = self._found, None
        if found is None:
            self._before = self._counted_before = None
            return 0
        assert found.phase == phase and self._checkpoint is not None
        self._counted_before = of.ggn, of.generator.get_state()
        with refusing_damage("checkpoint"):
            of.ggn = live_from_plain(found.live, of.network, of.options)
            of.generator.set_state(found.draws)
        self._digests, self._written = found.digests, len(found.digests)
        log.info("%s: going on after %d batches", self._checkpoint.path, self._written)
        return self._written

    def uncounted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches that are to be added; each counts when the next one is asked for.

        Args:
            batches: the loader's, from the first.

        Raises:
            InvalidValue: those that were counted are not these.
        """
        if self._checkpoint is None:
            yield from batches
            return
        self._start = Draws(self._of.network.device, self._loader).to_plain()
        before, number = len(self._digests), 0
        for number, batch in enumerate(batches, 1):
            self._end_if_due()
            mark = digest(batch)
            if number <= before:
                if mark != self._digests[number - 1]:
                    raise _other_data(self._checkpoint, f"batch {number} of other content")
                continue
            yield batch
            self._digests.append(mark)
            self._last = self._of.ggn, self._of.generator.get_state()
            if self._clock.is_time(self._checkpoint.every, len(self._digests)):
                self._write()
            self._end_if_due()
        if number < before:
            raise _other_data(self._checkpoint, f"{number} batches, where {before} were counted")

    def _end_if_due(self) -> None:
        """Where SIGTERM has come, write, and let it do what it does."""
        if self._termination.due:
            self._write()
            self._termination.deliver()

    def _write(self) -> None:
        """Write what was counted, unless it stands in the file."""
        if self._checkpoint is None or self._last is None or self._written == len(self._digests):
            return
        ggn, draws = self._last
        content = {
            "format": FORMAT,
            "pass": {
                "phase": self._phase,
                "digests": torch.tensor(self._digests, dtype=torch.int64, device="cpu"),
                **self._start,
            },
            "bound": self._bound,
            "curvature": live_to_plain(ggn),
            "draws": draws,
        }
        with self._clock.writing():
            rewrite(sealed(content), self._checkpoint.path)
        self._written = len(self._digests)

    def _opened(self, path: str | Path) -> Found:
        """What the file holds, where it is of this model, these options and these earlier data."""
        try:
            state = read(path)
        except InvalidValue as error:
            raise InvalidValue(
                "no checkpoint of a fit: damaged, or a file of another program",
                where=str(path),
                remedy=REMEDY,
            ) from error
        with refusing_damage("checkpoint"):
            found = opened(state, KEYS, KIND)
            check_seal(state, "checkpoint")
            check_bound(found["bound"].value, self._bound)
            own = found["pass"].fields(("phase", "digests", "states", "loader"))
            phase: Any = own["phase"].text(PHASES)
            states = RandomStates.from_plain(own["states"].value, self._of.network.device)
            loader = [one.value for one in own["loader"].entries()]
            digests = own["digests"].value.tolist()
        if len(loader) != len(generators_of(self._loader)):
            raise _other_data(self._checkpoint, "a loader with other generators")
        draws: Tensor = found["draws"].value
        return Found(phase, digests, (states, loader), found["curvature"], draws)


def _other_data(checkpoint: Checkpoint | None, got: str) -> InvalidValue:
    return InvalidValue(
        f"the data are not those that {checkpoint.path if checkpoint else ''} has counted",
        where="train_loader",
        got=got,
        remedy=f"A loader that shuffles has to be made as it was, its generator too. {REMEDY}",
    )
