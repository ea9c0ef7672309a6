"""Outputs and targets as rows: which axis holds a row is settled once for a network."""

from collections.abc import Sequence

from torch import Tensor

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.axes import canonical_axis, targets_last
from kfac_laplace.likelihoods.likelihood import Likelihood


def settled_axis(
    likelihood: Likelihood, output: Tensor, target: Tensor, given: int | None, known: int | None
) -> int:
    """The axis of the output that holds the c outputs of one row, -1 for the last.

    What the user gave comes first, then what earlier batches settled; only without both is it told
    from the shapes.

    Args:
        likelihood: tells it from shapes.
        output: what the model returned.
        target: its targets.
        given: `class_axis` as an option.
        known: the canonical axis that earlier batches settled.

    Raises:
        InvalidValue: the shapes allow several, no such axis, or another one than before.
    """
    if given is None:
        if known is None:
            return canonical_axis(likelihood.class_axis(output, target), output.shape)
        return canonical_axis(known, output.shape)
    axis = canonical_axis(given, output.shape)
    if output.ndim > 2 and known is not None and axis != known:
        raise InvalidValue(
            "means another axis than in earlier batches, whose outputs had other numbers of axes",
            where="class_axis",
            got=f"{given} for an output {tuple(output.shape)}",
            remedy="Count it from the end that stays the same",
        )
    return axis


def aligned_target(
    likelihood: Likelihood, target: Tensor, shape: Sequence[int], f: Tensor, axis: int
) -> Tensor:
    """Targets checked against outputs of a shape, as labels (n, t) or values (n, t, ·).

    Args:
        likelihood: p(y | f).
        target: as the loader gave them.
        shape: the output's, as the model returned it.
        f: the output as rows (n, t, c).
        axis: where the rows of the output lie.

    Raises:
        InvalidValue: targets of a wrong shape or range, or none for this axis.
        InvalidType: targets of a wrong dtype.
    """
    likelihood.check_axis(shape, target, axis)
    if axis != -1 and not likelihood.arranges_targets:
        target = targets_last(target, shape, axis)
    return likelihood.align_target(target, f)
