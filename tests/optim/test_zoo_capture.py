"""Factors of the caller's own training pass are those of `Curvature`, for every network of the zoo.

Everything inside is in evaluation mode, so that the two passes compute the same function; dropout
and batch statistics have tests of their own.
"""

from __future__ import annotations

import pytest
from optim.captured import (
    assert_same_factors,
    calm,
    capture,
    factors,
    negative_log_likelihood,
    reference,
    run,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo.case import N_DATA, build
from zoo.fitting import BUILDERS

#: One with convolutions, with attention, with recurrence and on graphs stand for the others, whose
#: tests are slow ones.
ALWAYS = {"gcn-graph", "group-norm-cnn", "lstm", "vit"}
#: The query of a first token that sees itself alone: its gradient is zero up to rounding, in a
#: network that computes in float32, and chance decides whether its row counts.
BY_CHANCE = {"t5-language": {"decoder.block.0.layer.0.SelfAttention.q.weight"}}


class Called(nn.Module):
    """A network with the function that calls it, as one module."""

    def __init__(self, inner: nn.Module, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, *args, **kwargs):
        return self.function(self.inner, *args, **kwargs)


def own_batch(name: str):
    """Model, likelihood, inputs, targets of which none is ignored, and options."""
    case, options = build(name), {}
    x, y = case.data
    if not y.is_floating_point():
        y = y.where(y >= 0, 0)
    model = case.model
    if function := case.options.get("forward_fn"):
        model = Called(model, function)
    if name == "transformer-decoder":  # (n, c, t), which is no token model's habit
        options["class_axis"] = 1
    assert case.options.keys() <= {"forward_fn", "batch_fn"}
    return model, case, x, y, options


def loss_of(model: nn.Module, likelihood: str, x, y: Tensor, class_axis: int | None = None):
    output = run(model, x)
    output = getattr(output, "logits", output)
    return negative_log_likelihood(likelihood, output, y, class_axis) / N_DATA


@pytest.mark.parametrize(
    "name",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS],
)
@pytest.mark.parametrize(
    ("fisher", "setting"),
    [("exact", "expand"), ("mc", "reduce"), ("empirical", "expand"), ("empirical", "reduce")],
)
def test_a_training_pass_gives_the_factors_of_curvature(name, fisher, setting):
    model, case, x, y, options = own_batch(name)
    likelihood = case.likelihood
    want = reference(model, likelihood, (x, y), fisher=fisher, kfac_approx=setting, **options)
    found = capture(calm(model), likelihood, fisher, kfac_approx=setting, **options)
    # The fused kernels of attention leave rounding noise where gradients are zero: rows of which
    # nothing reads would count in A. `Curvature` runs without them as well.
    with sdpa_kernel(SDPBackend.MATH):
        loss_of(model, likelihood, x, y, **options).backward()
    sums = found.take()
    assert {n for _, n in sums.values()} == {N_DATA}
    kron = {
        group.name
        for group in want.groups
        if group.treatment == "kron" and group.role != "bias" and not group.diagonal
    }
    assert sums.keys() == kron
    got = factors(sums)
    if fisher == "empirical":
        got = {key: pair for key, pair in got.items() if key not in BY_CHANCE.get(name, ())}
    assert_same_factors(got, factors(want.blocks), case.tolerance)
