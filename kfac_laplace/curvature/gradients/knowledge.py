"""What batches have taught about a model: frozen, so that a refused batch teaches nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.rows.entries import Entries
from kfac_laplace.curvature.rows.layout import Layout, flat_layout
from kfac_laplace.curvature.rows.part_layout import PartLayout
from kfac_laplace.curvature.rows.row_layout import RowLayout

#: a use's parameters, and its kind, number of leading axes and turn among such uses
UseKey = tuple[tuple[str, ...], tuple[str, int, int]]


@dataclass(frozen=True)
class Knowledge:
    """Groups of parameters, and how their rows lie in batches.

    Args:
        tracked: names of the parameters that gradients are wanted for, in model order.
        groups: groups of these that share a block; empty before the first batch.
        class_axis: axis of the outputs that holds the c outputs of one row, -1 for the last.
        axis_known: whether a batch whose outputs have more than two axes settled it.
        row_layouts: which rows of a use belong to which example; None where no layout fits.
        settled: uses whose layout no later batch can contradict.
        row_entries: gradient rows of one example and vector, all recorded calls together.
        unread: digests of the patterns of rows that no output of an example depends on, wherever
            the rows are moved.
        unseen: digests of the patterns of rows without a gradient that were found to be these.
        reorders: whether images may be handed to convolutions with channels last.
        listed: whether the log says what has no Kronecker factors.
        effective: names of the tracked parameters that some batch's outputs depend on.
        told: names of those that the log says to be without effect.
        late: names of those that the log says to be used first in a later batch.
        interface: what is known about inputs and outputs, and whether they were checked.
    """

    tracked: tuple[str, ...]
    groups: tuple[Group, ...] = ()
    class_axis: int = -1
    axis_known: bool = False
    row_layouts: Mapping[UseKey, RowLayout | None] = field(default_factory=dict)
    settled: frozenset[UseKey] = frozenset()
    row_entries: int = 1
    unread: frozenset[bytes] = frozenset()
    unseen: frozenset[bytes] = frozenset()
    reorders: bool = True
    listed: bool = False
    effective: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    interface: Interface = Interface()

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the tracked parameters without effect on any output so far, in model order."""
        return tuple(name for name in self.tracked if name not in self.effective)

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
        """All entries inside the posterior behind one another."""
        return PartLayout.of(flat_layout(self.shapes), self.entries)

    @property
    def entries(self) -> dict[str, Entries]:
        """Which entries of these parameters are inside, in model order."""
        entries = {
            name: each
            for group in self.groups
            for name, each in zip(group.layout.params, group.block_layout.entries, strict=True)
        }
        return {name: entries[name] for name in self.params}

    def rows_alone(self, tracked: tuple[str, ...]) -> "Knowledge":
        """How rows lie in the model's layers, for a fit that groups its parameters anew."""
        return replace(self, tracked=tracked, groups=(), row_entries=1, effective=frozenset())

    def axis_alone(self, tracked: tuple[str, ...]) -> "Knowledge":
        """Where the outputs have their classes, for a model whose parameters are others now."""
        fresh = Knowledge(tracked, reorders=self.reorders, interface=self.interface)
        return replace(fresh, class_axis=self.class_axis, axis_known=self.axis_known)

    @property
    def axis(self) -> int | None:
        """The class axis, or None while nothing has settled it."""
        return self.class_axis if self.axis_known else None

    def with_axis(self, axis: int, axes: int) -> "Knowledge":
        """The same with the class axis that a batch settled.

        Args:
            axis: -1 for the last.
            axes: number of axes of the outputs; those of (n, c) say nothing of others.
        """
        if axes <= 2 or self.axis_known:
            return self
        return replace(self, class_axis=axis, axis_known=True)

    def unchecked(self) -> "Knowledge":
        """The same with nothing checked yet, for another fit."""
        return replace(self, interface=self.interface.afresh())

    def with_rows_of(self, other: "Knowledge") -> "Knowledge":
        """The same groups, with how rows and outputs lie by what both have seen."""
        axis = self if self.axis_known else other
        return replace(
            self,
            class_axis=axis.class_axis,
            axis_known=axis.axis_known,
            row_layouts={**self.row_layouts, **other.row_layouts},
            settled=self.settled | other.settled,
            unread=self.unread | other.unread,
            unseen=self.unseen | other.unseen,
            reorders=self.reorders and other.reorders,
            listed=self.listed or other.listed,
            effective=self.effective | other.effective,
            told=self.told | other.told,
            late=self.late | other.late,
            interface=self.interface.joined(other.interface),
        )
