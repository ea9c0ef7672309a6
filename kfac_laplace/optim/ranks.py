"""Training on several processes: factors are sums over examples, so those of the ranks add up.

All ranks then have the same factors, and with the gradients that `DistributedDataParallel` averages
they make the same updates.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.curvature.linalg.packed import pack, unpack
from kfac_laplace.optim.averages import Sums


def ranks_of(model: nn.Module, widest: int) -> "Ranks":
    """The ranks that a model's wrapper for parallel data works with; one where there is none.

    Args:
        model: as the caller has it.
        widest: as for `Ranks`.
    """
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return Ranks(None, widest)
        model = inner
    return Ranks(model.process_group, widest)


class Ranks:
    """Processes that train one model.

    Args:
        group: their process group; None for one process.
        widest: of input factors with more columns there is the diagonal alone.
    """

    def __init__(self, group: Any, widest: int):
        self._group, self._widest = group, widest

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self._group is not None and dist.get_world_size(self._group) > 1

    def of_first(self, value: Any) -> Any:
        """What the first rank has, as plain data; all ranks have to ask."""
        if not self.several:
            return value
        found = [value]
        first = dist.get_global_rank(self._group, 0)
        dist.broadcast_object_list(found, first, self._group)
        return found[0]

    def summed(self, sums: Sums, groups: Sequence[Group], like: Tensor) -> Sums:
        """Sums over the examples of all ranks; all ranks have to ask.

        Args:
            sums: this rank's.
            groups: all groups that any rank may have captured, in one order.
            like: a tensor on the device, in the precision of the sums.
        """
        if not self.several or not groups:
            return sums
        counts, flat = [], []
        for group in groups:
            n, count, *factors = self._parts(sums, group, like)
            counts += [n, *count.tolist()]
            flat += [one.flatten() for one in factors]
        numbers = torch.tensor(counts, dtype=torch.float64, device=like.device)
        entries = torch.cat(flat)
        dist.all_reduce(numbers, group=self._group)
        dist.all_reduce(entries, group=self._group)
        return self._joined(groups, numbers, entries, flat)

    def _parts(
        self, sums: Sums, group: Group, like: Tensor
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """Examples, counts (b,), Σ a aᵀ and B, packed, of a group; zeros without any."""
        shapes = self._shapes(group)
        if group.name not in sums:
            zeros = [like.new_zeros(shape) for shape in shapes]
            return 0.0, like.new_zeros(group.layout.matrix[0]), zeros[0], zeros[1]
        block, n = sums[group.name]
        if block.has_diagonal_input:
            inputs = block.input_sum
        else:
            inputs = pack(block.inputs.matrices())
        return n, block.input_count, inputs, pack(block.outputs.matrices())

    def _shapes(self, group: Group) -> tuple[torch.Size, torch.Size]:
        """Shapes of A and B, packed, or of A's diagonal."""
        b, o, i = group.layout.matrix
        diagonal = i > self._widest
        return torch.Size((b, i)) if diagonal else _packed(b, i), _packed(b, o)

    def _joined(
        self, groups: Sequence[Group], numbers: Tensor, entries: Tensor, flat: Sequence[Tensor]
    ) -> Sums:
        """The blocks in sums over ranks, of groups that some rank has captured."""
        found: Sums = {}
        parts = iter(entries.split([len(one) for one in flat]))
        start = 0
        for group in groups:
            b = group.layout.matrix[0]
            n, count = numbers[start], numbers[start + 1 : start + 1 + b]
            start += 1 + b
            a, outputs = (next(parts).view(shape) for shape in self._shapes(group))
            if n > 0:
                inputs = a.clone() if a.ndim == 2 else Gram.of(unpack(a))
                block = KroneckerBlock.of(
                    group.layout, inputs, count.clone(), Gram.of(unpack(outputs))
                )
                found[group.name] = block, float(n)
        return found


def _packed(b: int, width: int) -> torch.Size:
    """Shape of b packed matrices."""
    return pack(torch.empty(b, width, width, device="meta")).shape
