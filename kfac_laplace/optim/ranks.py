"""Training on several processes: factors are sums over examples, so those of the ranks add up.

All ranks then have the same factors, and with the gradients that `DistributedDataParallel` averages
they make the same updates.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.packed import packed_zeros
from kfac_laplace.curvature.ranks import Ranks, data_parallel, ranks_of
from kfac_laplace.optim.averages import Sums

log = logging.getLogger("kfac_laplace")


def training_ranks(model: nn.Module, group: Any) -> Ranks | None:
    """The processes that train a model: those given, or those of its wrapper for parallel data.

    Args:
        model: as the caller has it.
        group: an option `process_group`, of a loop that averages gradients itself.
    """
    if group is not None:
        return ranks_of(group)
    wrapper = data_parallel(model)
    return None if wrapper is None else ranks_of(wrapper.process_group)


def ranks_of_pass() -> Ranks | None:
    """The processes of the wrapper for parallel data whose forward pass runs now, if one does."""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return None if wrapper is None else ranks_of(wrapper.process_group)


def tell_of_others() -> None:
    """Warn where other processes run, and none of them is known to train the model too."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        log.warning(
            "%d processes run, and KFAC knows of this one alone: where the others train the model "
            "too, their weights go apart. Train it in DistributedDataParallel, or pass "
            "process_group='world' where the loop averages gradients itself",
            dist.get_world_size(),
        )


def summed(ranks: Ranks, sums: Sums, groups: Sequence[Group], like: Tensor, widest: int) -> Sums:
    """Sums over the examples of all ranks; all ranks have to ask.

    Args:
        ranks: the processes.
        sums: this rank's.
        groups: all groups that any rank may have captured, in one order.
        like: a tensor on the device, in the precision of the sums.
        widest: of input factors with more columns there is the diagonal alone.
    """
    parts = {group: _part(sums, group, like, widest) for group in groups}
    ranks.add_([tensor for part in parts.values() for tensor in part.values()], like.device)
    found: Sums = {}
    for group, part in parts.items():
        if n := float(part.pop("n")):
            found[group.name] = KroneckerBlock.from_sums(group.layout, part, None), n
    return found


def _part(sums: Sums, group: Group, like: Tensor, widest: int) -> dict[str, Tensor]:
    """Number of examples n, and the sums of a group's block; zeros without any."""
    if group.name in sums:
        block, n = sums[group.name]
        return {"n": _number(n, like), **block.sums()}
    b, o, i = group.layout.matrix
    return {
        "n": _number(0.0, like),
        "input": like.new_zeros(b, i) if i > widest else packed_zeros(i, like).repeat(b, 1, 1),
        "count": like.new_zeros(b, dtype=torch.float64),
        "output": packed_zeros(o, like).repeat(b, 1, 1),
    }


def _number(n: float, like: Tensor) -> Tensor:
    return torch.full((1,), n, dtype=torch.float64, device=like.device)
