"""What ranks do in the tests of ends that come too early; new processes import it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from curvature.parted import network, part

from kfac_laplace import Checkpoint, Curvature
from kfac_laplace.errors import OtherRankFailed

#: Which rank fails, and after how many batches: the first has 3, the second 4, and "ekfac" reads
#: them twice.
INTERRUPTED = {
    "kron": ((0, 0), (0, 1), (1, 2), (1, 3)),
    "ekfac": ((1, 1), (0, 3), (1, 5), (0, 5)),
    "lowrank": ((0, 2), (1, 1)),
}


def resumed(ends: tuple[int, ...], structure: str) -> list[tuple[str, bool, list[str]]]:
    """Fits that a rank's error interrupts before one of its batches, and that go on.

    Returns:
        For each the error on this rank, whether the end has the bits of a fit without interruption,
        and what is left in the folder.
    """
    options: dict[str, Any] = {"hessian_structure": structure, "process_group": "world"}
    own = part(ends, dist.get_rank())

    def curvature() -> Curvature:
        return Curvature(network(), "classification", fisher="mc", **options)

    want, found = curvature().fit(own).state_dict(), []
    for failing, at in INTERRUPTED[structure]:
        names = [tempfile.mkdtemp()]
        dist.broadcast_object_list(names)
        kept, said = Checkpoint(Path(names[0]) / "fit", every=1), ""
        loader: Any = Ending(own, at, fail) if dist.get_rank() == failing else own
        try:
            curvature().fit(loader, checkpoint=kept)
        except (OSError, OtherRankFailed) as error:
            said = f"{type(error).__name__}: {error}"
        dist.barrier()
        again = curvature().fit(own, checkpoint=kept)
        dist.barrier()
        equal = again.state_dict()["checksum"] == want["checksum"]
        found.append((said, equal, sorted(os.listdir(names[0]))))
    return found


class Ending:
    """Batches of which some can be read, over all passes, before something happens.

    Args:
        batches: all.
        left: how many can be read.
        end: what happens then.
    """

    def __init__(self, batches: list[Any], left: int, end: Callable[[], object]):
        self.batches, self.left, self.end = batches, left, end

    def __iter__(self) -> Iterator[Any]:
        """The batches, until then."""
        for batch in self.batches:
            self.left -= 1
            if self.left < 0:
                self.end()
            yield batch


def fail() -> None:
    """Raise what a reader of files raises."""
    raise OSError("the disk is gone")


def kill() -> None:
    """End this process as a scheduler does."""
    os.kill(os.getpid(), signal.SIGKILL)


def all_resumed(ends: tuple[int, ...]) -> dict[str, list[tuple[str, bool, list[str]]]]:
    """Those of each structure."""
    return {structure: resumed(ends, structure) for structure in INTERRUPTED}


def killed(ends: tuple[int, ...]) -> tuple[str, int]:
    """What a fit raises while rank 1 is killed, and how many examples it left."""
    own: Any = part(ends, dist.get_rank())
    if dist.get_rank() == 1:
        own = Ending(own, 2, kill)
    curvature = Curvature(network(), "classification", process_group="world")
    try:
        curvature.fit(own)
    except RuntimeError as error:
        return str(error), curvature.n_data
    return "", curvature.n_data


#: Structure, and how many batches each rank reads before it is killed, over all passes; None: it
#: outlives the others. The last has no data.
KILLED: dict[str, tuple[str, tuple[int | None, ...]]] = {
    "before the first batch": ("kron", (None, 0, None)),
    "amid its own part": ("kron", (2, None, None)),
    "in the second pass": ("ekfac", (None, 5, None)),
    "at the end of a part": ("lowrank", (None, 3, None)),
    "all with data, at different batches": ("ekfac", (2, 3, None)),
}


def _fitted(own: Any, structure: str, kept: Checkpoint | None) -> Curvature:
    options: dict[str, Any] = {"hessian_structure": structure, "process_group": "world"}
    return Curvature(network(), "classification", fisher="mc", **options).fit(own, checkpoint=kept)


def fitted_until_killed(ends: tuple[int, ...], how: str, path: Path) -> str:
    """A fit that keeps what it counts, of which ranks are killed; what the others raise."""
    structure, at = KILLED[how]
    rank = dist.get_rank()
    own, until = part(ends, rank), at[rank]
    try:
        _fitted(
            own if until is None else Ending(own, until, kill), structure, Checkpoint(path, every=1)
        )
    except RuntimeError as error:
        return str(error)
    return ""


def gone_on(ends: tuple[int, ...], how: str, path: Path) -> bool:
    """The same fit in new processes: whether it has the bits of one that was left alone."""
    structure, own = KILLED[how][0], part(ends, dist.get_rank())
    got = _fitted(own, structure, Checkpoint(path, every=1)).state_dict()
    return bool(got["checksum"] == _fitted(own, structure, None).state_dict()["checksum"])
