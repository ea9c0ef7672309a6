"""The processes of a group, and what they tell each other: objects, sums, and that one failed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_laplace.errors import InvalidType, InvalidValue, OtherRankFailed

WORLD = "world"
#: Bytes that are sent at a time: a copy of so much is made.
BUCKET = 2**26
Told = TypeVar("Told")


@dataclass(frozen=True)
class Ranks:
    """Two processes or more. What they do together, each of them has to call.

    Args:
        group: process group of torch.distributed.
    """

    group: Any

    @property
    def rank(self) -> int:
        """Number of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size(self.group)

    def gathered(self, tell: Callable[[], Told]) -> list[Told]:
        """What each rank tells, in the order of ranks.

        Args:
            tell: makes it.

        Raises:
            OtherRankFailed: `tell` raised on another rank, where it did not on this one. No rank
                waits for one that has failed.
        """
        failure: Exception | None = None
        told: tuple[str | None, Any]
        try:
            told = None, tell()
        except Exception as error:  # raised below, once the others know
            failure, told = error, (f"{type(error).__name__}: {error}", None)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, told, self.group)
        if failure is not None:
            raise failure
        for rank, (failed, _) in enumerate(parts):
            if failed is not None:
                raise OtherRankFailed(
                    failed.rstrip("."), where=f"rank {rank}", remedy="All ranks end with it"
                )
        return [value for _, value in parts]

    def together(self, make: Callable[[], Told]) -> Told:
        """What each rank makes for itself, once all have: where one fails, all raise.

        Args:
            make: makes it.

        Raises:
            OtherRankFailed: as for `gathered`.
        """
        made: list[Told] = []
        self.gathered(lambda: made.append(make()))
        return made[0]

    def of_first(self, value: Told) -> Told:
        """What the first rank has."""
        found = [value]
        dist.broadcast_object_list(found, dist.get_global_rank(self.group, 0), self.group)
        return found[0]

    def add_(self, tensors: Sequence[Tensor], device: torch.device) -> int:
        """Sum tensors, dense in memory, over the ranks in place, to the same bits on each.

        Args:
            tensors: what is summed, of the same shapes on all ranks.
            device: where the group sums; tensors that lie elsewhere go there and back in buckets.

        Returns:
            The number of bytes that were summed.
        """
        sent = 0
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].device == device:
                dist.all_reduce(bucket[0], group=self.group)
            else:
                flat = torch.cat(bucket).to(device)
                dist.all_reduce(flat, group=self.group)
                for piece, own in zip(bucket, flat.split([*map(len, bucket)]), strict=True):
                    piece.copy_(own)
            sent += sum(piece.numel() * piece.element_size() for piece in bucket)
        return sent

    def shared_out(
        self,
        jobs: Sequence[Callable[[], Sequence[Tensor]]],
        costs: Sequence[float],
        device: torch.device,
        home: torch.device | None = None,
    ) -> list[list[Tensor]]:
        """What each job makes, each made on one rank and sent to the others.

        Args:
            jobs: make tensors, which have to be of the same shapes on all ranks.
            costs: of the jobs, by which they are shared out; the same numbers on all ranks.
            device: of the tensors here; a rank may have no job of its own.
            home: where they lie before and after they are sent, if not there.
        """
        owners = shared_jobs(costs, self.size)
        forms: list[Any] = [None] * len(jobs)

        def own() -> dict[int, list[tuple[torch.dtype, torch.Size]]]:
            mine = [k for k, owner in enumerate(owners) if owner == self.rank]
            for k in mine:
                forms[k] = [tensor.contiguous() for tensor in jobs[k]()]
            return {k: [(each.dtype, each.shape) for each in forms[k]] for k in mine}

        told = {k: form for part in self.gathered(own) for k, form in part.items()}
        return [
            [one.to(home or device) for one in self._from(owner, forms[k], told[k], device)]
            for k, owner in enumerate(owners)
        ]

    def _from(
        self,
        owner: int,
        made: list[Tensor] | None,
        form: Sequence[tuple[torch.dtype, torch.Size]],
        device: torch.device,
    ) -> list[Tensor]:
        """One rank's tensors on all."""
        if made is None:
            made = [torch.empty(shape, dtype=dtype, device=device) for dtype, shape in form]
        return [self.sent(tensor.to(device), owner) for tensor in made]

    def sent(self, tensor: Tensor, rank: int) -> Tensor:
        """A tensor of one rank's on all, in place; one without entries is not sent."""
        if tensor.numel():
            dist.broadcast(tensor, dist.get_global_rank(self.group, rank), self.group)
        return tensor


def shared_jobs(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each job: the dearest first, each to the rank with least to do."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = min(range(ranks), key=load.__getitem__)
        load[owners[k]] += costs[k]
    return owners


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of tensors, of one dtype and device and at most `BUCKET` bytes together."""
    bucket: list[Tensor] = []
    room = BUCKET

    def kind(tensor: Tensor) -> tuple[str, str]:
        return str(tensor.dtype), str(tensor.device)

    for tensor in sorted(tensors, key=kind):
        size = tensor.element_size()
        for piece in tensor.view(-1).split(BUCKET // size):
            if bucket and (kind(piece) != kind(bucket[0]) or len(piece) * size > room):
                yield bucket
                bucket, room = [], BUCKET
            bucket.append(piece)
            room -= len(piece) * size
    if bucket:
        yield bucket


# --- the option ----------------------------------------------------------------------------------


def check_group(group: Any) -> None:
    """Raise `InvalidType` for what is no option `process_group`."""
    known = group is None or (isinstance(group, str) and group == WORLD)
    if known or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    outside = dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER
    raise (InvalidValue if outside else InvalidType)(
        "this process is not in the group" if outside else "no process group",
        where="process_group",
        got=repr(group),
        remedy="Call it on the ranks of the group alone"
        if outside
        else "Pass 'world', a group of torch.distributed, or None",
    )


def ranks_of(group: Any) -> Ranks | None:
    """The ranks of an option `process_group`; None for one process.

    Args:
        group: None, "world" for all ranks, or a group of torch.distributed.

    Raises:
        InvalidValue: torch.distributed is not running.
    """
    if group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidValue(
            "torch.distributed is not running",
            where="process_group",
            got=repr(group),
            remedy="Start by torchrun and call torch.distributed.init_process_group first",
        )
    found = Ranks(dist.group.WORLD if isinstance(group, str) else group)
    return found if found.size > 1 else None


def data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper by which processes average a model's gradients, if it has one."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return None
        model = inner
    return model
