"""How the parameters of a group lie in its block: a stack of matrices (b, o, i)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A group of parameters seen as b matrices of o rows and i columns.

    A linear layer with its bias is one matrix (1, out, in + 1) whose last column is the bias; a
    grouped convolution has b = groups; anything else is one row (1, 1, p).

    Args:
        params: parameter names, in the order in which they are flattened.
        shapes: their shapes.
        matrix: (b, o, i), where b·o·i is the number of entries.
    """

    params: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    matrix: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Number of scalar parameters p."""
        return sum(shape.numel() for shape in self.shapes)

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stack parameter-shaped tensors (..., *shape) into matrices (..., b, o, i)."""
        b, o, i = self.matrix
        parts = []
        for name, shape in zip(self.params, self.shapes, strict=True):
            tensor = tensors[name]
            lead = tensor.shape[: tensor.ndim - len(shape)]
            parts.append(tensor.reshape((*lead, b, o, -1)))
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def unpack(self, matrices: Tensor) -> dict[str, Tensor]:
        """Undo `pack`: matrices (..., b, o, i) to one tensor (..., *shape) a parameter."""
        b, o, _ = self.matrix
        widths = [shape.numel() // (b * o) for shape in self.shapes]
        lead = matrices.shape[:-3]
        return {
            name: part.reshape((*lead, *shape))
            for name, shape, part in zip(
                self.params, self.shapes, matrices.split(widths, -1), strict=True
            )
        }

    @cached_property
    def order(self) -> Tensor:
        """For each parameter entry, flattened one tensor after another, its place in the matrix."""
        places = torch.arange(self.size).reshape(self.matrix)
        return torch.cat([part.flatten() for part in self.unpack(places).values()])


def flat_layout(shapes: Mapping[str, torch.Size]) -> Layout:
    """All parameters behind one another in a single row (1, 1, p)."""
    layout = Layout(tuple(shapes), tuple(shapes.values()), (1, 1, 0))
    return Layout(layout.params, layout.shapes, (1, 1, layout.size))
