"""The axis of outputs along which the outputs of one row lie, and shapes seen without it."""

from collections.abc import Sequence

from torch import Tensor

from kfac_laplace.errors import InvalidValue


def canonical_axis(axis: int, shape: Sequence[int]) -> int:
    """-1 for the last axis of outputs, otherwise its number; (n, c) and (n,) have no other.

    Args:
        axis: as users give it, also from the end.
        shape: the output's.

    Raises:
        InvalidValue: the outputs have no such axis, or it runs over the examples.
    """
    rank = len(shape)
    if rank <= 2 and axis in (-1, 1):
        return -1
    place = axis + rank if axis < 0 else axis
    if not 0 < place < rank:
        raise InvalidValue(
            "the outputs have no such axis of classes",
            where="class_axis",
            got=f"{axis} for an output {tuple(shape)}",
            remedy="Count from 0, which are the examples, or from the end",
        )
    return -1 if place == rank - 1 else place


def classes_last(values: Tensor, axis: int) -> Tensor:
    """Values shaped as outputs with their rows along the last axis.

    Args:
        values: of any shape; one of at most two axes stays as it is.
        axis: a canonical axis.
    """
    return values if axis == -1 or values.ndim <= 2 else values.movedim(axis, -1)


def targets_last(target: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """Targets with their axes in the order of the rows of outputs, where they have that axis.

    Args:
        target: shaped as the output (but for axes of length 1, or for the axis itself), or without
            the axis.
        shape: the output's.
        axis: a canonical axis.
    """
    if axis == -1 or len(shape) <= 2:
        return target
    if same_layout(shape, target.shape):
        target = target.reshape(tuple(shape))
    return target.movedim(axis, -1) if target.ndim == len(shape) else target


def fits(shape: Sequence[int], target: Sequence[int], axis: int) -> bool:
    """Whether targets lie as outputs do, with or without the axis of the rows.

    Args:
        shape: the output's, of three axes or more.
        target: the target's.
        axis: a canonical axis.
    """
    positions = without(shape, axis)
    inside = len(target) == len(shape) and without(target, axis) == positions
    return same_layout(shape, target) or tuple(target) == positions or inside


def same_layout(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are the same but for axes of length 1."""
    return [s for s in shape if s != 1] == [s for s in other if s != 1]


def without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """A shape without one of its axes."""
    left = list(shape)
    del left[axis]
    return tuple(left)


def ambiguous(shape: Sequence[int], target: Sequence[int]) -> InvalidValue:
    """The error for shapes that leave open where the classes are, to be raised by the caller."""
    return InvalidValue(
        "the outputs of a row may lie along axis 1 or along the last: the shapes allow both",
        where="class_axis",
        got=f"an output {tuple(shape)} with targets {tuple(target)}",
        remedy="Say which: class_axis=1 or class_axis=-1",
    )
