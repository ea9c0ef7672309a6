"""Bit by bit what `torch.optim.AdamW(foreach=False)` does."""

import pytest
import torch
from torch import nn

from kfac_laplace.optim.bases import Bases, Eigenbases, Side
from kfac_laplace.optim.rules import AdamW, EigenAdam, descend_

BETAS, EPS, DECAY, STEPS = (0.8, 0.97), 1e-7, 0.03, 20


def schedule(step):
    """A warm-up and a decline, with a step at zero."""
    return [0.0, 0.001, 0.01, 0.03][step] if step < 4 else 0.03 * 0.9**step


def torchs(start, gradients):
    """The weights after each step of torch's AdamW."""
    parameter = nn.Parameter(start.clone())
    options = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY, "foreach": False}
    optimizer, weights = torch.optim.AdamW([parameter], **options), []
    for step, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = schedule(step)
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights


def draws(shape, dtype):
    """Gradients of very different sizes, zeros among them."""
    gradients = [torch.randn(shape, dtype=dtype) * 10.0 ** (k % 5 - 3) for k in range(STEPS)]
    gradients[3].zero_()
    return gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (1,), (37,), (5, 17), (8, 3, 3, 3), (0, 4)], ids=str)
def test_adamw_is_torchs(shape, dtype):
    start, gradients = torch.randn(shape, dtype=dtype), draws(shape, dtype)
    rule, weight = AdamW(BETAS, EPS), start.clone()
    state = rule.init(weight)
    for step, expected in enumerate(torchs(start, gradients)):
        updates = rule.lengths(rule.directions([gradients[step]], [state]), [schedule(step)])
        descend_([weight], updates, lr=schedule(step), weight_decay=DECAY)
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigen_adam_in_own_coordinates_is_torchs_adamw(dtype):
    """Weights and biases of linear layers and of a grouped convolution, as parts of matrices."""
    shapes = {"fc": (1, 5, 18), "other fc": (1, 5, 18), "grouped": (2, 4, 28)}
    starts = [torch.randn(shape, dtype=dtype) for shape in shapes.values()]
    gradients = [draws(shape, dtype) for shape in shapes.values()]
    parts = (lambda matrices: matrices[..., :-1], lambda matrices: matrices[..., -1])

    def split(matrices):
        return {str(index): part(matrices) for index, part in enumerate(parts)}

    expected = [
        torchs(part(start).contiguous(), [part(one).contiguous() for one in drawn])
        for start, drawn in zip(starts, gradients, strict=True)
        for part in parts
    ]
    rule = EigenAdam(BETAS, EPS)
    bases = Eigenbases([Bases(Side(one[:, :, 0]), Side(one[:, 0])) for one in starts])
    states = [rule.init(start) for start in starts]
    weights = [part(start).clone() for start in starts for part in parts]
    for step in range(STEPS):
        directions = rule.directions([drawn[step] for drawn in gradients], states, bases)
        updates = rule.lengths(directions, [schedule(step)] * len(starts))
        pieces = [one for update in updates for one in update.parts(split).values()]
        descend_(weights, pieces, lr=schedule(step), weight_decay=DECAY)
        for weight, one in zip(weights, expected, strict=True):
            assert torch.equal(weight, one[step])


def test_groups_count_their_own_steps():
    """One that has no gradient in some steps is corrected for those that it made."""
    rule, gradients = AdamW(BETAS, EPS), draws((7,), torch.float64)
    expected = torchs(torch.ones(7).double(), gradients[:2])
    often, seldom = torch.ones(7).double(), torch.ones(7).double()
    states = [rule.init(often), rule.init(seldom)]
    descend_(
        [often], [rule.directions([gradients[5]], states[:1])[0].update], lr=0.1, weight_decay=0
    )
    for step in range(2):
        updates = rule.lengths(rule.directions([gradients[step]] * 2, states), [schedule(step)] * 2)
        descend_([often, seldom], updates, lr=schedule(step), weight_decay=DECAY)
        assert torch.equal(seldom, expected[step])
    assert [state["step"] for state in states] == [3, 2]


def test_a_step_without_parameters_is_none():
    assert AdamW().directions([], []) == []
    descend_([], [], lr=0.1, weight_decay=0.1)


def test_a_learning_rate_may_be_a_tensor():
    rule, weights = AdamW(), [torch.ones(3).double(), torch.ones(3).double()]
    for weight, lr in zip(weights, (0.25, torch.tensor(0.25)), strict=True):
        updates = rule.lengths(rule.directions([weight * 3], [rule.init(weight)]), [lr])
        descend_([weight], updates, lr=lr, weight_decay=0.1)
    assert torch.equal(*weights)
