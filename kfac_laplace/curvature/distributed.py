"""Curvature of data that lie with several processes: sums over ranks, to the same bits on each.

Curvature of a data set is a sum over its examples. Each rank sums those of its own shard; then raw
sums and counts are added up, symmetric matrices in packed storage, in buckets of bounded size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.errors import InvalidType, InvalidValue, OtherRankFailed
from kfac_laplace.states.plain import same

#: Bytes that are sent at a time: a copy of so much is made.
BUCKET = 2**26
#: What tensors of zeros are made of: dtypes and shapes, by name.
Forms = Mapping[str, tuple[torch.dtype, torch.Size]]


@dataclass(frozen=True)
class Part:
    """What a rank tells the others of its shard: all but the entries of its curvature.

    Args:
        binding: structure, likelihood and estimator.
        knowledge: groups, and how rows lie.
        settings: expand or reduce, by group.
        blocks: kind, layout and sums of each block; empty without data.
        statistic: the likelihood's sum.
        counts: examples, rows and outputs.
        targets: what is known of the targets alone.
    """

    binding: tuple[Any, ...]
    knowledge: Knowledge
    settings: Mapping[str, Setting]
    blocks: Mapping[str, tuple[type[Block], Layout, Forms]]
    statistic: Tensor
    counts: tuple[float, float, float]
    targets: Tensor

    @classmethod
    def of(cls, ggn: GGN) -> "Part":
        """What there is to tell of a shard's GGN."""
        blocks = {
            name: (type(block), block.layout, _forms(block.sums()))
            for name, block in ggn.blocks.items()
        }
        return cls(
            (*ggn.options.binding, ggn.options.fisher),
            ggn.knowledge,
            dict(ggn.settings),
            blocks,
            ggn.statistic.cpu(),
            (ggn.n_data, ggn.n_rows, ggn.n_outputs),
            ggn.targets.cpu(),
        )

    def counted(self, own: GGN) -> GGN:
        """As a GGN without blocks, on the device of one's own."""
        device = own.statistic.device
        return GGN(
            own.options,
            self.knowledge,
            self.settings,
            {},
            self.statistic.to(device),
            *self.counts,
            targets=self.targets.to(device),
            bases=own.bases,
        )


def summed(group: Any, shard: Callable[[], GGN]) -> GGN:
    """The GGN of all ranks' shards; every rank has to call it, and gets the same bits.

    Args:
        group: process group.
        shard: makes this rank's own; without blocks where it has no data.

    Raises:
        OtherRankFailed: another rank's shard raised, where this one's did not: no rank waits for
            one that has failed.
        InvalidValue: the ranks learned different groups, settings or class axes.
    """
    own: GGN | None = None
    told: Part | str
    try:
        own = shard()
        told = Part.of(own)
    except Exception as error:  # raised below, once the others know
        failure, told = error, f"{type(error).__name__}: {error}"
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, told, group)
    if isinstance(told, str):
        raise failure
    for rank, part in enumerate(parts):
        if isinstance(part, str):
            raise OtherRankFailed(
                part.rstrip("."), where=f"rank {rank}", remedy="Nothing was added on any rank"
            )
    assert own is not None
    return _total(group, own, parts)


def _total(group: Any, own: GGN, parts: Sequence[Part]) -> GGN:
    """The sum, by what each rank has told."""
    filled = [(rank, part) for rank, part in enumerate(parts) if part.blocks]
    if not filled:
        return own
    for rank, part in filled[1:]:
        _check_alike(filled[0], (rank, part))
    first = filled[0][1]
    counted = reduce(
        lambda one, other: one.joined({}, other), (part.counted(own) for _, part in filled)
    )
    device = own.statistic.device
    sums = {
        name: own.blocks[name].sums() if own.blocks else _zeros(forms, device)
        for name, (_, _, forms) in first.blocks.items()
    }
    for bucket in _buckets([tensor for each in sums.values() for tensor in each.values()]):
        _all_reduce(group, bucket)
    blocks = {
        name: kind.from_sums(layout, sums[name], own.bases.get(name))
        for name, (kind, layout, _) in first.blocks.items()
    }
    return counted.with_blocks(blocks)


def _check_alike(first: tuple[int, Part], other: tuple[int, Part]) -> None:
    """Raise `InvalidValue` where two ranks' curvatures cannot be added."""
    (a, one), (b, two) = first, other
    axes = one.knowledge.axis, two.knowledge.axis
    if not same(one.binding, two.binding):
        what, got = "structure, likelihood or estimator", ""
    elif None not in axes and axes[0] != axes[1]:
        what, got = "class axis", f"{axes[0]} and {axes[1]}"
    elif not same(one.settings, two.settings):
        what, got = "settings", f"{dict(one.settings)} and {dict(two.settings)}"
    elif not same(one.blocks, two.blocks):
        names = [*one.blocks, *(name for name in two.blocks if name not in one.blocks)]
        what = "groups"
        got = next(n for n in names if not same(one.blocks.get(n), two.blocks.get(n)))
    else:
        return
    raise InvalidValue(
        f"ranks {a} and {b} have different {what}",
        where="process_group",
        got=got or None,
        remedy="Give all ranks the same model and options, kfac_approx and class_axis among them, "
        "and first batches that use all parameters",
    )


def _forms(tensors: Mapping[str, Tensor]) -> Forms:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _zeros(forms: Forms, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for name, (dtype, shape) in forms.items()
    }


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Flat pieces of tensors, of one dtype and at most `BUCKET` bytes together."""
    bucket: list[Tensor] = []
    room = BUCKET
    for tensor in sorted(tensors, key=lambda each: str(each.dtype)):
        size = tensor.element_size()
        for piece in tensor.view(-1).split(BUCKET // size):
            if bucket and (piece.dtype != bucket[0].dtype or len(piece) * size > room):
                yield bucket
                bucket, room = [], BUCKET
            bucket.append(piece)
            room -= len(piece) * size
    if bucket:
        yield bucket


def _all_reduce(group: Any, bucket: Sequence[Tensor]) -> None:
    """Sum pieces over the ranks, in place."""
    if len(bucket) == 1:
        dist.all_reduce(bucket[0], group=group)
        return
    flat = torch.cat(list(bucket))
    dist.all_reduce(flat, group=group)
    for piece, found in zip(bucket, flat.split([len(each) for each in bucket]), strict=True):
        piece.copy_(found)


def resolve_group(group: Any) -> Any:
    """The process group of an option, or None for this process alone.

    Args:
        group: None, "world" for all ranks, or a group of torch.distributed.

    Raises:
        InvalidValue: torch.distributed is not running, or this process is not in the group.
        InvalidType: something else.
    """
    if group is None:
        return None
    running = dist.is_available() and dist.is_initialized()
    if isinstance(group, str) and group == "world" and running:
        return dist.group.WORLD
    if running and isinstance(group, dist.ProcessGroup):
        return group
    if running and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidValue(
            "this process is not in the group",
            where="process_group",
            remedy="Call it on the ranks of the group alone",
        )
    if group == "world" or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise InvalidValue(
            "torch.distributed is not running",
            where="process_group",
            got=repr(group),
            remedy="Start by torchrun and call torch.distributed.init_process_group first",
        )
    raise InvalidType(
        "no process group",
        where="process_group",
        got=repr(group),
        remedy="Pass 'world', a group of torch.distributed, or None",
    )
