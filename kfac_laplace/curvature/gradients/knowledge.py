"""What batches have taught about a model: frozen, so that a refused batch teaches nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.rows.layout import Layout, flat_layout
from kfac_laplace.curvature.rows.row_layout import RowLayout

#: a use's parameters, and its kind, number of leading axes and turn among such uses
UseKey = tuple[tuple[str, ...], tuple[str, int, int]]


@dataclass(frozen=True)
class Knowledge:
    """Groups of parameters, and how their rows lie in batches.

    Args:
        tracked: names of the parameters that gradients are wanted for, in model order.
        groups: groups of these that share a block; empty before the first batch.
        class_axis: axis of the outputs that holds the c outputs of one row.
        row_layouts: which rows of a use belong to which example; None where no layout fits.
        settled: uses whose layout no later batch can contradict.
        row_entries: gradient rows of one example and vector, all recorded calls together.
        reorders: whether images may be handed to convolutions with channels last.
        watched: whether gradients that cancel under reduce were looked for.
        listed: whether the log says what has no Kronecker factors.
        interface: what is known about inputs and outputs, and whether they were checked.
    """

    tracked: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    class_axis: int = -1
    row_layouts: Mapping[UseKey, RowLayout | None] = field(default_factory=dict)
    settled: frozenset[UseKey] = frozenset()
    row_entries: int = 1
    reorders: bool = True
    watched: bool = False
    listed: bool = False
    interface: Interface = Interface()

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters that have a group, in model order."""
        inside = {name for group in self.groups for name in group.layout.params}
        return tuple(name for name in self.tracked if name in inside)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of these parameters, likewise."""
        shapes = {
            name: shape
            for group in self.groups
            for name, shape in zip(group.layout.params, group.layout.shapes, strict=True)
        }
        return {name: shapes[name] for name in self.params}

    @property
    def full_layout(self) -> Layout:
        """All of them behind one another."""
        return flat_layout(self.shapes)

    def rows_alone(self, tracked: tuple[str, ...]) -> "Knowledge":
        """How rows lie in the model's layers, for a fit that groups its parameters anew."""
        return replace(self, tracked=tracked, groups=(), class_axis=-1, row_entries=1)

    def unchecked(self) -> "Knowledge":
        """The same with nothing checked yet, for another fit."""
        return replace(self, interface=self.interface.afresh())

    def with_rows_of(self, other: "Knowledge") -> "Knowledge":
        """The same groups, with how rows lie by what both have seen."""
        return replace(
            self,
            row_layouts={**self.row_layouts, **other.row_layouts},
            settled=self.settled | other.settled,
            reorders=self.reorders and other.reorders,
            watched=self.watched or other.watched,
            listed=self.listed or other.listed,
            interface=self.interface.joined(other.interface),
        )
