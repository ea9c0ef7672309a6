"""Some entries of a group's parameters as a block of their own, as a subnetwork has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.rows.entries import Entries
from kfac_laplace.curvature.rows.layout import Layout


@dataclass(frozen=True)
class PartLayout(Layout):
    """Entries of a group's parameters behind one another in one row (1, 1, k).

    Args:
        parent: how the parameters lie in the group's own matrices.
        inside: the entries of each parameter.
    """

    parent: Layout | None = None
    inside: tuple[Entries, ...] = ()

    @classmethod
    def of(cls, parent: Layout, entries: Mapping[str, Entries]) -> Layout:
        """The layout of some entries by parameter; the parent itself where they are all."""
        inside = tuple(entries[name] for name in parent.params)
        if all(each.places is None for each in inside):
            return parent
        row = (1, 1, sum(each.count for each in inside))
        return cls(parent.params, parent.shapes, row, parent=parent, inside=inside)

    @property
    def entries(self) -> tuple[Entries, ...]:
        """The entries of each parameter."""
        return self.inside

    @property
    def whole(self) -> Layout:
        """The group's own."""
        assert self.parent is not None
        return self.parent

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries of parameter-shaped tensors (..., *shape), (..., 1, 1, k)."""
        parts = [
            each.take(tensors[name]) for name, each in zip(self.params, self.inside, strict=True)
        ]
        return torch.cat(parts, -1)[..., None, None, :]

    def unpack(self, matrices: Tensor) -> dict[str, Tensor]:
        """Entries (..., 1, 1, k) as parameter-shaped tensors, zero where none is."""
        parts = self.by_entry(matrices)
        pairs = zip(self.params, self.inside, strict=True)
        return {name: each.spread(parts[name]) for name, each in pairs}

    def by_entry(self, matrices: Tensor) -> dict[str, Tensor]:
        """Entries (..., 1, 1, k) as one vector (..., count) a parameter."""
        parts = matrices[..., 0, 0, :].split([each.count for each in self.inside], -1)
        return dict(zip(self.params, parts, strict=True))

    def of_whole(self, matrices: Tensor) -> Tensor:
        """The entries (..., 1, 1, k) of the group's own matrices (..., b, o, i)."""
        return self.pack(self.whole.unpack(matrices))

    @cached_property
    def places(self) -> Tensor:
        """Where the entries stand in the group's own matrices once these are flattened, (k,)."""
        order = self.whole.order.split([shape.numel() for shape in self.shapes])
        shaped = {
            name: part.reshape(shape)
            for name, shape, part in zip(self.params, self.shapes, order, strict=True)
        }
        return self.pack(shaped)[0, 0]

    @cached_property
    def order(self) -> Tensor:
        """The entries stand in the order of the parameters."""
        return torch.arange(self.size, device="cpu")
