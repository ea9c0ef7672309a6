"""Undamped, what is learned does not depend on the coordinates of the inputs; damped, at a rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace.optim import KFAC, Damped, Estimate, ExactDamping, FactoredDamping

EVERY_STEP = Estimate(fisher="exact", every=1, bases_every=1, ema=0.0)
STEPS = 3


def draws(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def outputs(damping, likelihood, changed):
    """Of a network of two layers before each of three steps and after, (4, n, c).

    Changed: of inputs T x + c, by the same function at the start.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = draws(40, 4, seed=0), draws(40, 3, seed=1)
    if changed:
        matrix, shift = torch.eye(4).double() + 0.5 * draws(4, 4, seed=2), draws(4, seed=3)
        x = x @ matrix.T + shift
        weight = model[0].weight.detach() @ torch.linalg.inv(matrix)
        model[0].bias.data -= weight @ shift
        model[0].weight.data = weight
    rule = Damped(damping, momentum=0.0, length=None)
    optimizer = KFAC(model, likelihood, lr=0.5, weight_decay=0.0, rule=rule, curvature=EVERY_STEP)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        f = model(x)
        found.append(f.detach())
        if likelihood == "regression":
            loss = 0.5 * (f - y).square().sum() / len(x)
        else:
            loss = nn.functional.cross_entropy(f, y.argmax(1))
        loss.backward()
        optimizer.step()
    return torch.stack([*found, model(x).detach()])


def differences(damping, likelihood):
    """Largest ones of the outputs, by the number of steps taken, 0 to 3."""
    usual, changed = (outputs(damping, likelihood, changed) for changed in (False, True))
    assert float((usual[-1] - usual[0]).abs().max()) > 1  # there is something that may differ
    return (usual - changed).abs().amax((1, 2))


def test_without_damping_coordinates_of_inputs_do_not_matter():
    """Condition numbers of factors are up to 1,500: rounding grows to 3e-13."""
    assert differences(ExactDamping(0.0), "regression").max() < 1e-10


@pytest.mark.parametrize(
    ("likelihood", "damping", "strength", "rate"),
    [
        ("regression", ExactDamping, 1e-7, 10),
        ("regression", ExactDamping, 1e-8, 10),
        # B of a softmax is singular: its last direction has no gradient, but rounding / λ
        ("classification", ExactDamping, 1e-8, 10),
        ("regression", FactoredDamping, 1e-9, 10**0.5),
    ],
)
def test_what_damping_costs_of_it_shrinks_like_its_strength(likelihood, damping, strength, rate):
    """To first order the difference is λ, in the matrix that is inverted, or √λ, in its factors.

    The next order is the same once more: about 1 % here, as larger strengths show.
    """
    larger = differences(damping(strength), likelihood)
    smaller = differences(damping(strength / 10), likelihood)
    assert max(larger[0], smaller[0]) < 1e-14  # one function at the start
    assert larger[1:].min() > 1e-6  # far above rounding
    torch.testing.assert_close(
        larger[1:] / smaller[1:], torch.full((STEPS,), rate).double(), rtol=0.02, atol=0
    )
