"""The parameters of a posterior, all groups together: one vector, tensors by name, matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.rows.entries import Entries
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
    def whole(self) -> "Layouts":
        """The same groups with all entries of their parameters."""
        return Layouts({name: la.whole for name, la in self.groups.items()}, self.params)

    @cached_property
    def entries(self) -> dict[str, Entries]:
        """Which entries of each parameter are inside, in parameter order."""
        entries = {
            name: each
            for layout in self.groups.values()
            for name, each in zip(layout.params, layout.entries, strict=True)
        }
        return {name: entries[name] for name in self.params}

    @property
    def has_parts(self) -> bool:
        """Whether some entries of a parameter are outside."""
        return any(each.places is not None for each in self.entries.values())

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
        """Split a vector (..., p) in parameter order into tensors (..., *shape).

        Entries that are outside are zero.
        """
        parts = vector.split([each.count for each in self.entries.values()], -1)
        pairs = zip(self.entries.items(), parts, strict=True)
        return {name: each.spread(part) for (name, each), part in pairs}

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors (..., *shape) by parameter name as the groups' matrices (..., b, o, i)."""
        return {name: layout.pack(tensors) for name, layout in self.groups.items()}

    def pack_vector(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector (..., p) in parameter order into the groups' matrices (..., b, o, i)."""
        return self.pack(self.by_parameter(vector))

    def flatten(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `pack_vector`: matrices (..., b, o, i) to one vector (..., p)."""
        parts: dict[str, Tensor] = {}
        for name, layout in self.groups.items():
            parts |= layout.by_entry(matrices[name])
        return torch.cat([parts[name] for name in self.params], -1)
