"""Which axis of the output holds the outputs of a row: told from shapes, given, or asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Heteroscedastic,
    Likelihood,
    Poisson,
    StudentT,
    aligned_target,
    settled_axis,
)


class Counts(Likelihood):
    """Labels by a likelihood of a user's own, with nothing said about axes."""

    def distribution(self, f, sigma):
        return torch.distributions.Categorical(logits=f)

    def hessian(self, f):
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


class Second(Poisson):
    """Counts whose outputs lie along axis 1; where the targets lie is left to the library."""

    def class_axis(self, output, target):
        return 1


class Arranged(Second):
    """The same, with targets that it arranges itself."""

    def class_axis(self, output, target):
        return 1

    def align_target(self, target, f):
        return super().align_target(target.movedim(1, -1), f)


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("likelihood", "output", "target"),
    [
        (Categorical(), (2, 4, 4), labels(2, 4)),
        (Categorical(), (1, 2, 2), labels(1, 2)),
        (Categorical(), (4, 4, 4), labels(4, 4)),
        (Categorical(), (2, 3, 3, 3), labels(2, 3, 3)),
        (Categorical(ignore_index=0), (2, 3, 3), labels(2, 3)),
        (Categorical(label_smoothing=0.1), (2, 3, 3), labels(2, 3)),
        (Counts(), (2, 3, 3), labels(2, 3)),
        (Heteroscedastic(), (5, 2, 2), floats(5, 2)),
    ],
)
def test_shapes_that_allow_two_axes_are_refused(likelihood, output, target):
    """The remedy is the option, which settles it either way."""
    with pytest.raises(InvalidValue, match=r"class_axis.*class_axis=1 or class_axis=-1"):
        settled_axis(likelihood, floats(*output), target, None, None)
    for axis in (-1, 1):
        assert settled_axis(likelihood, floats(*output), target, axis, None) == axis
        assert settled_axis(likelihood, floats(*output), target, None, axis) == axis


@pytest.mark.parametrize(
    ("likelihood", "output", "target", "axis"),
    [
        (Categorical(), (3, 3), labels(3), -1),
        (Categorical(), (2, 4, 3), labels(2, 4), -1),
        (Categorical(), (2, 3, 4), labels(2, 4), 1),
        (Categorical(), (3, 3, 3, 4), labels(3, 3, 3), -1),
        (Categorical(), (2, 3, 4, 4), labels(2, 4, 4), 1),
        (Categorical(), (2, 3, 3, 4), labels(2, 3, 4), 1),
        (Counts(), (2, 4, 3), labels(2, 4), -1),
        (Gaussian(), (3, 3, 3), floats(3, 3, 3), -1),
        (Gaussian(), (3, 3, 1), floats(3, 3), -1),
        (Bernoulli(), (3, 3, 3), floats(3, 3, 3), -1),
        (Bernoulli(), (3,), floats(3), -1),
        (Poisson(), (3, 3, 3), floats(3, 3, 3), -1),
        (StudentT(), (2, 3, 3), floats(2, 3, 3), -1),
        (Heteroscedastic(), (2, 2, 2), floats(2, 2, 1), -1),
        (Heteroscedastic(), (5, 3, 4), floats(5, 3, 2), -1),
        (Heteroscedastic(), (2, 2), floats(2), -1),
        (Second(), (2, 3, 4), floats(2, 3, 4), 1),
    ],
)
def test_shapes_that_allow_one_axis_need_no_option(likelihood, output, target, axis):
    """Where each output has a target of its own, which axis is whose does not change the loss."""
    assert settled_axis(likelihood, floats(*output), target, None, None) == axis


@pytest.mark.parametrize(
    ("given", "shape", "axis"),
    [(2, (2, 3, 4), -1), (-1, (2, 3, 4), -1), (-2, (2, 3, 4), 1), (1, (2, 3, 4, 5), 1)]
    + [(2, (2, 3, 4, 5), 2), (-2, (2, 3, 4, 5), 2), (1, (2, 3), -1), (-1, (2,), -1)],
)
def test_the_option_counts_from_either_end(given, shape, axis):
    target = floats(*shape)
    assert settled_axis(Gaussian(), floats(*shape), target, given, None) == axis


@pytest.mark.parametrize(("given", "shape"), [(3, (2, 3, 4)), (-3, (2, 3, 4)), (2, (2, 3))])
def test_an_axis_that_the_output_does_not_have(given, shape):
    with pytest.raises(InvalidValue, match="class_axis"):
        settled_axis(Gaussian(), floats(*shape), floats(*shape), given, None)


def test_a_negative_axis_that_means_two_is_refused():
    """(n, c, t) and then (n, c, h, w): −2 was axis 1 and would be axis 2."""
    with pytest.raises(InvalidValue, match="class_axis"):
        settled_axis(Categorical(), floats(2, 3, 4, 5), labels(2, 4, 5), -2, 1)


@pytest.mark.parametrize(
    ("value", "error"), [(0, InvalidValue), (1.5, InvalidType), ("last", InvalidType)]
)
def test_options_that_are_no_axis(value, error):
    with pytest.raises(error, match="class_axis"):
        Laplace(torch.nn.Linear(2, 2), class_axis=value)


@pytest.mark.parametrize(
    ("likelihood", "output", "target", "axis"),
    [
        (Categorical(), (2, 3, 4), labels(2, 3), 1),
        (Categorical(), (2, 3, 4), labels(2, 4), -1),
        (Categorical(), (2, 3, 4, 5), labels(2, 5, 4), 1),
        (Categorical(), (2, 3, 3, 4), labels(2, 3, 3), 1),
        (Poisson(), (2, 3, 4), floats(2, 4, 3), 1),
        (Heteroscedastic(), (2, 4, 3), floats(2, 4, 3)[:, :, :2], 1),
        (Heteroscedastic(), (2, 4, 1, 3), floats(2, 2, 3), 1),
        (Gaussian(), (2, 3, 4), floats(2, 4, 3), 1),
    ],
)
def test_targets_that_contradict_the_axis(likelihood, output, target, axis):
    """As many values would fit in another order: they are not taken."""
    f = likelihood.align(floats(*output), axis)
    with pytest.raises(InvalidValue, match="target"):
        aligned_target(likelihood, target, output, f, axis)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    ("likelihood", "squeezed"),
    [(Gaussian(), False), (Gaussian(), True), (Bernoulli(), False), (Poisson(), False)]
    + [(StudentT(), False), (Second(), False), (Arranged(), False)],
)
def test_targets_lie_as_outputs_do(likelihood, squeezed, axis):
    """Outputs on axis 1 (or 2) with targets beside them: row by row they are those of that axis."""
    if isinstance(likelihood, Second) and axis != 1:
        axis = 1
    shape = [2, 4, 5]
    shape.insert(axis, 3)
    if squeezed:
        shape[3 if axis == 1 else 1] = 1
    y = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64)[: torch.Size(shape).numel()]
    y = (y % 2 if isinstance(likelihood, Bernoulli) else y).reshape(shape)
    f = y.movedim(axis, -1).flatten(1, -2)
    assert torch.equal(likelihood.align(y, axis), f)
    got = aligned_target(likelihood, y.squeeze() if squeezed else y, shape, f, axis)
    assert torch.equal(got, f)


def test_a_weight_of_positives_runs_along_the_axis():
    """One value for each output: along the last axis, as torch has it, or along the one given."""
    f = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.randint(0, 2, (2, 3, 4)).double()
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    likelihood = Bernoulli(pos_weight=weight)
    rows = likelihood.align(f, 1)
    got = likelihood.log_prob(rows, aligned_target(likelihood, y, f.shape, rows, 1), floats())
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        f, y, pos_weight=weight[:, None], reduction="none"
    )
    torch.testing.assert_close(got, -losses.sum((1, 2)))
