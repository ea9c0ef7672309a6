"""Adam in the eigenbasis: a naive computation, and what it does not depend on."""

import torch
from optim.problems import SHAPES, Run, assert_all_close, factors_of, gradients_of

from kfac_laplace.optim import KFAC
from kfac_laplace.optim.rules import EigenAdam

BETAS, EPS = (0.8, 0.97), 1e-7


def eigenvectors(factor):
    """As the table has them; a side of width one is not turned."""
    if factor.shape[-1] == 1:
        return torch.ones_like(factor)
    return torch.linalg.eigh(factor).eigenvectors


def carried(v, before, after):
    """The diagonal in other coordinates of a covariance that is diagonal in these."""
    left, right = (new.T @ old for new, old in zip(after, before, strict=True))
    if v.numel() > 500:  # the same without the covariance
        return left.square() @ v @ right.square().T
    change = torch.kron(left, right)
    return (change @ v.flatten().diag() @ change.T).diag().reshape(v.shape)


def test_steps_are_those_of_the_formula():
    """m kept in the parameters' coordinates, v in the eigenbasis of every step; block by block.

    v is carried to the next basis as the diagonal of a covariance that was diagonal in the last.
    """
    run = Run(EigenAdam(BETAS, EPS), SHAPES)
    m = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    v = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}
    bases = {}
    for t in range(1, 7):
        gradients, factors = gradients_of(SHAPES), factors_of(SHAPES)
        found, expected = run.step(gradients, factors), {}
        for name, gradient in gradients.items():
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * gradient
            expected[name] = torch.empty_like(gradient)
            for k in range(len(gradient)):
                q_b, q_a = (eigenvectors(one)[k] for one in factors[name])
                turned = q_b.T @ gradient[k] @ q_a
                if (name, k) in bases:
                    v[name][k] = carried(v[name][k], bases[name, k], (q_b, q_a))
                bases[name, k] = q_b, q_a
                v[name][k] = BETAS[1] * v[name][k] + (1 - BETAS[1]) * turned**2
                m_hat = q_b.T @ (m[name][k] / (1 - BETAS[0] ** t)) @ q_a
                v_hat = v[name][k] / (1 - BETAS[1] ** t)
                expected[name][k] = q_b @ (m_hat / (v_hat.sqrt() + EPS)) @ q_a.T
        assert_all_close(found, expected)


def test_only_the_sides_that_change_are_turned():
    """The momentum in the parameters' coordinates is the same before and after."""
    rule, run = EigenAdam(), Run(EigenAdam(), SHAPES, every=50)
    run.step(gradients_of(SHAPES), factors_of(SHAPES))
    states, before = list(run.states.values()), run.bases()
    momentum = dict(zip(SHAPES, before.leave([state["m"] for state in states]), strict=True))
    changed = {name: run.table.bases(name, None) for name in SHAPES}
    factors = {"first": factors_of(SHAPES)["first"], "large": factors_of(SHAPES)["large"]}
    inside = [state["m"].clone() for state in states]
    assert run.table.update(50, factors)
    rule.turn(states, before, run.bases())
    after = dict(zip(SHAPES, run.bases().leave([state["m"] for state in states]), strict=True))
    assert_all_close(after, momentum)
    moved = [not torch.equal(a, state["m"]) for a, state in zip(inside, states, strict=True)]
    assert dict(zip(SHAPES, moved, strict=True)) == {name: name in factors for name in SHAPES}
    assert changed["row"].right is run.table.bases("row", None).right


def test_a_basis_that_stays_costs_the_momentum_nothing():
    run = Run(EigenAdam(), SHAPES, every=50)
    run.step(gradients_of(SHAPES), factors_of(SHAPES))
    before = {name: state["m"].clone() for name, state in run.states.items()}
    run.rule.turn(list(run.states.values()), run.bases(), run.bases())
    assert all(torch.equal(before[name], state["m"]) for name, state in run.states.items())


def test_at_the_first_step_all_eigendirections_move_alike():
    """m̂ = G and v̂ = (Q_BᵀGQ_A)², so with ε = 0 the step has entries ± 1 in the eigenbasis."""
    run = Run(EigenAdam(eps=0.0), SHAPES)
    found = list(run.step(gradients_of(SHAPES), factors_of(SHAPES)).values())
    for entered in run.bases().enter(found):
        torch.testing.assert_close(entered.abs(), torch.ones_like(entered), rtol=0, atol=1e-11)


def test_factors_that_gain_rank_make_no_steps_without_bound():
    """A layer of 60 inputs, 6 examples a step: by index v of a null space would divide others."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(60, 4)
    optimizer = KFAC(model, "regression", lr=1e-2, rule=EigenAdam(BETAS))
    before, largest = model.weight.detach().clone(), 0.0
    for _ in range(12):
        x, y = torch.randn(6, 60, generator=generator), torch.randn(6, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        after = model.weight.detach().clone()
        largest, before = max(largest, float((after - before).norm())), after
    # In any basis each of the 240 entries moves by about the learning rate, as under Adam.
    assert largest < 3 * 1e-2 * 240**0.5
