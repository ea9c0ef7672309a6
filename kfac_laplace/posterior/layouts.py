"""The parameters of a posterior, all groups together: one vector, tensors by name, matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.rows.layout import Layout


@dataclass(frozen=True)
class Layouts:
    """How the groups' matrices (b, o, i) lie in a vector of all parameters.

    Args:
        groups: group name to layout, in the order of layerwise precisions.
        params: parameter names in the order of the vector, that of `parameters_to_vector`.
    """

    groups: Mapping[str, Layout]
    params: Sequence[str]

    def in_same_order(self, other: "Layouts") -> bool:
        """Whether another has the same groups one after another."""
        return [*self.groups.items()] == [*other.groups.items()]

    @property
    def size(self) -> int:
        """Number of scalar parameters p."""
        return sum(layout.size for layout in self.groups.values())

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter, in parameter order."""
        shapes = {
            name: shape
            for layout in self.groups.values()
            for name, shape in zip(layout.params, layout.shapes, strict=True)
        }
        return {name: shapes[name] for name in self.params}

    def part(self, groups: Sequence[str]) -> "Layouts":
        """Some of the groups."""
        chosen = {name: self.groups[name] for name in groups}
        inside = {name for layout in chosen.values() for name in layout.params}
        return Layouts(chosen, [name for name in self.params if name in inside])

    def by_parameter(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector (..., p) in parameter order into tensors (..., *shape)."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors (..., *shape) by parameter name as the groups' matrices (..., b, o, i)."""
        return {name: layout.pack(tensors) for name, layout in self.groups.items()}

    def pack_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector (..., p) in parameter order into the groups' matrices (..., b, o, i)."""
        return self.pack(self.by_parameter(vector))

    def flatten(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `pack_vector`: matrices (..., b, o, i) to one vector (..., p)."""
        tensors: dict[str, Tensor] = {}
        for name, layout in self.groups.items():
            tensors |= layout.unpack(matrices[name])
        parts = [
            tensors[name].reshape((*tensors[name].shape[: tensors[name].ndim - len(shape)], -1))
            for name, shape in self.shapes.items()
        ]
        return torch.cat(parts, -1)
