"""How the parameters of a group lie in its block: a stack of matrices (b, o, i)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.rows.entries import Entries


@dataclass(frozen=True)
class Fold:
    """How a weight becomes matrices: `weight.reshape(split).permute(order).reshape(b, o, i)`.

    Args:
        split: shape into which the weight is reshaped first.
        order: permutation of those axes.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]


#: folds, one after another
Chain = tuple[Fold, ...]


@dataclass(frozen=True)
class Layout:
    """A group of parameters seen as b matrices of o rows and i columns.

    A linear layer with its bias is one matrix (1, out, in + 1) whose last column is the bias; a
    grouped convolution has b = groups, a packed attention projection b = 3; anything else is one
    row (1, 1, p).

    Args:
        params: parameter names, in the order in which they are flattened.
        shapes: their shapes.
        matrix: (b, o, i), where b·o·i is the number of entries.
        parts: number of equal parts into which each parameter falls, one behind the other.
        folds: how a part of each parameter becomes matrices, fold after fold; () for a reshape.
    """

    params: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    matrix: tuple[int, int, int]
    parts: int = 1
    folds: tuple[Chain, ...] = ()

    @property
    def size(self) -> int:
        """Number of scalar parameters p."""
        return sum(each.count for each in self.entries)

    @property
    def entries(self) -> tuple[Entries, ...]:
        """Which entries of each parameter the block has: all, unless it is a `PartLayout`."""
        return tuple(Entries(shape) for shape in self.shapes)

    @property
    def whole(self) -> "Layout":
        """How all entries lie in the group's matrices: itself, unless it is a `PartLayout`."""
        return self

    @property
    def _chains(self) -> tuple[Chain, ...]:
        return self.folds or ((),) * len(self.params)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stack parameter-shaped tensors (..., *shape) into matrices (..., b, o, i)."""
        b, o, _ = self.matrix
        packed = []
        for name, shape, chain in zip(self.params, self.shapes, self._chains, strict=True):
            tensor = tensors[name]
            lead = tensor.shape[: tensor.ndim - len(shape)]
            folded = fold(tensor.reshape((*lead, self.parts, -1)), chain, len(lead) + 1)
            packed.append(folded.reshape((*lead, b, o, -1)))
        return torch.cat(packed, -1) if len(packed) > 1 else packed[0]

    def unpack(self, matrices: Tensor) -> dict[str, Tensor]:
        """Undo `pack`: matrices (..., b, o, i) to one tensor (..., *shape) a parameter."""
        b, o, _ = self.matrix
        widths = [shape.numel() // (b * o) for shape in self.shapes]
        lead = matrices.shape[:-3]
        unpacked = {}
        for name, shape, chain, part in zip(
            self.params, self.shapes, self._chains, matrices.split(widths, -1), strict=True
        ):
            flat = part.reshape((*lead, self.parts, -1))
            unpacked[name] = unfold(flat, chain, len(lead) + 1).reshape((*lead, *shape))
        return unpacked

    def by_entry(self, matrices: Tensor) -> dict[str, Tensor]:
        """Matrices (..., b, o, i) as one vector (..., count) a parameter."""
        lead = matrices.shape[:-3]
        return {name: part.reshape((*lead, -1)) for name, part in self.unpack(matrices).items()}

    def of_whole(self, matrices: Tensor) -> Tensor:
        """The block's entries of the group's matrices (..., b, o, i): all of them."""
        return matrices

    @cached_property
    def order(self) -> Tensor:
        """For each parameter entry, flattened one tensor after another, its place in the matrix."""
        places = torch.arange(self.size, device="cpu").reshape(self.matrix)
        return torch.cat([part.flatten() for part in self.unpack(places).values()])


def fold(tensor: Tensor, chain: Chain, lead: int) -> Tensor:
    """Apply folds one after another to all but the first `lead` axes."""
    for step in chain:
        tensor = tensor.reshape((*tensor.shape[:lead], *step.split))
        tensor = tensor.permute(*range(lead), *(lead + axis for axis in step.order))
    return tensor


def unfold(tensor: Tensor, chain: Chain, lead: int) -> Tensor:
    """Undo `fold`."""
    for step in reversed(chain):
        moved = [step.split[axis] for axis in step.order]
        tensor = tensor.reshape((*tensor.shape[:lead], *moved))
        back = [step.order.index(axis) for axis in range(len(step.order))]
        tensor = tensor.permute(*range(lead), *(lead + axis for axis in back))
    return tensor


def flat_layout(shapes: Mapping[str, torch.Size]) -> Layout:
    """All parameters behind one another in a single row (1, 1, p)."""
    size = sum(shape.numel() for shape in shapes.values())
    return Layout(tuple(shapes), tuple(shapes.values()), (1, 1, size))
