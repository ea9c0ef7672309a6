"""The damped natural gradient against dense inverses, and the lengths of its steps."""

import pytest
import torch
from optim.problems import (
    SHAPES,
    Run,
    assert_all_close,
    dense,
    factor,
    factors_of,
    gradients_of,
    softmax_factor,
)
from torch import nn

from kfac_laplace.optim.rules import (
    AdamNorm,
    Damped,
    EigenAdam,
    ExactDamping,
    FactoredDamping,
    KLClip,
)

STRENGTH = 0.02
DAMPINGS = [ExactDamping(STRENGTH), FactoredDamping(STRENGTH)]


def damped_matrix(damping, b, a, strength):
    """The dense matrix of one block that a step is divided by."""
    if isinstance(damping, ExactDamping):
        return dense(b, a) + strength * torch.eye(len(b) * len(a)).double()
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    left = b + strength**0.5 / pi * torch.eye(len(b)).double()
    return dense(left, a + pi * strength**0.5 * torch.eye(len(a)).double())


def oracle(damping, gradients, factors, strengths):
    found = {}
    for (name, gradient), strength in zip(gradients.items(), strengths, strict=True):
        blocks = [
            torch.linalg.solve(damped_matrix(damping, b, a, strength), block.flatten())
            for block, b, a in zip(gradient, *factors[name], strict=True)
        ]
        found[name] = torch.stack(blocks).view_as(gradient)
    return found


#: Without the large group, of which a dense matrix would have 9,000 rows.
GROUPS = {name: shape for name, shape in SHAPES.items() if name != "large"}


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_solves_the_dense_system(damping, momentum):
    run, m = Run(Damped(damping, momentum, None), GROUPS), dict.fromkeys(GROUPS, 0.0)
    for t in range(1, 5):
        gradients, factors = gradients_of(GROUPS), factors_of(GROUPS)
        m = {name: momentum * m[name] + (1 - momentum) * gradients[name] for name in GROUPS}
        m_hat = {name: one / (1 - momentum**t) for name, one in m.items()}
        expected = oracle(damping, m_hat, factors, [STRENGTH] * len(GROUPS))
        assert_all_close(run.step(gradients, factors), expected)


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_each_group_may_have_a_damping_of_its_own(damping, kind):
    strengths, gradients, factors = [0.5, 0.01, 2.0, 0.1], gradients_of(GROUPS), factors_of(GROUPS)
    expected = oracle(damping, gradients, factors, strengths)
    given = [kind(one) if kind is float else kind(one, dtype=torch.float64) for one in strengths]
    found = Run(Damped(damping, 0.0, None), GROUPS).step(gradients, factors, dampings=given)
    assert_all_close(found, expected)


def test_a_number_is_factored_damping():
    assert Damped(0.5) == Damped(FactoredDamping(0.5))
    assert Damped() == Damped(FactoredDamping(1e-3), 0.9, AdamNorm(0.95, 1e-8))


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
def test_softmax_factors_of_deficient_rank(damping):
    """B (1, ..., 1)ᵀ = 0: damping alone holds that direction."""
    shapes = {"head": (1, 6, 4)}
    gradients, factors = gradients_of(shapes), {"head": (softmax_factor(6), factor(1, 4))}
    expected = oracle(damping, gradients, factors, [STRENGTH])
    assert_all_close(Run(Damped(damping, 0.0, None), shapes).step(gradients, factors), expected)


def test_dead_layers_have_damping_alone():
    """π would be 0/0: it is 1, and the inverse 1/λ."""
    shapes = {"dead": (1, 3, 4)}
    gradients = gradients_of(shapes)
    factors = {"dead": (torch.zeros(1, 3, 3).double(), torch.zeros(1, 4, 4).double())}
    for damping in DAMPINGS:
        found = Run(Damped(damping, 0.0, None), shapes).step(gradients, factors)
        assert_all_close(found, {"dead": gradients["dead"] / STRENGTH}, 1e-14)


def test_wide_sides_are_inverted_by_their_diagonals():
    shapes = {"wide": (2, 3, 5)}
    gradients, factors = gradients_of(shapes), factors_of(shapes)
    b, a = factors["wide"]
    diagonal = {"wide": (b, torch.diag_embed(a.diagonal(dim1=1, dim2=2)))}
    for damping in DAMPINGS:
        found = Run(Damped(damping, 0.0, None), shapes, largest=4).step(gradients, factors)
        assert_all_close(found, oracle(damping, gradients, diagonal, [STRENGTH]))


def test_one_undamped_step_solves_least_squares():
    """A = XᵀX/n and B = I are the Hessian of ½|Y − XWᵀ|²/n: Newton's method ends in one step."""
    x, y = torch.randn(30, 5).double(), torch.randn(30, 3).double()
    start = torch.randn(3, 5).double()
    gradient = ((start @ x.T - y.T) @ x / 30)[None]
    factors = {"fc": (torch.eye(3).double()[None], (x.T @ x / 30)[None])}
    for damping in (ExactDamping(0.0), FactoredDamping(0.0)):
        run = Run(Damped(damping, 0.9, None), {"fc": (1, 3, 5)})
        run.weights["fc"].copy_(start)
        run.step({"fc": gradient}, factors, lr=1.0)
        expected = torch.linalg.lstsq(x, y).solution.T
        torch.testing.assert_close(run.weights["fc"][0], expected, rtol=0, atol=1e-12)


# --- lengths ------------------------------------------------------------------------------------


def test_a_grafted_step_is_as_long_as_adams():
    """Of the whole group, by torch's own Adam, over steps in which the moments matter."""
    run = Run(Damped(STRENGTH, 0.9, AdamNorm(0.95, 1e-8)), SHAPES)
    parameters = {name: nn.Parameter(torch.zeros(s).double()) for name, s in SHAPES.items()}
    adam = torch.optim.Adam(parameters.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    bare = Run(Damped(STRENGTH, 0.9, None), SHAPES)
    for _ in range(6):
        gradients, factors = gradients_of(SHAPES), factors_of(SHAPES)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
            parameter.data.zero_()
        adam.step()
        found, direction = run.step(gradients, factors), bare.step(gradients, factors)
        assert_all_close(
            {name: one.norm() for name, one in found.items()},
            {name: parameter.detach().norm() for name, parameter in parameters.items()},
        )
        assert_all_close(
            {name: one / one.norm() for name, one in found.items()},
            {name: one / one.norm() for name, one in direction.items()},
        )


def test_a_grafted_step_without_gradient_is_zero():
    shapes = {"still": (1, 3, 4)}
    run = Run(Damped(), shapes)
    found = run.step({"still": torch.zeros(1, 3, 4).double()}, factors_of(shapes))
    assert float(found["still"].abs().max()) == 0


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_clip_bounds_the_step_in_the_metric_of_the_damped_curvature(damping, momentum):
    """lr² Σ Uᵀ (F + damping) U is κ where the clip acts, summed over all groups."""
    bound, lr = 1e-3, 0.3
    run = Run(Damped(damping, momentum, KLClip(bound)), GROUPS)
    bare = Run(Damped(damping, momentum, None), GROUPS)
    for _ in range(3):
        gradients, factors = gradients_of(GROUPS), factors_of(GROUPS)
        found, free = run.step(gradients, factors, lr), bare.step(gradients, factors, lr)

        def length(updates, factors=factors):
            blocks = (
                u.flatten() @ damped_matrix(damping, b, a, STRENGTH) @ u.flatten()
                for name, update in updates.items()
                for u, b, a in zip(update, *factors[name], strict=True)
            )
            return lr**2 * float(sum(blocks))

        assert length(free) > bound
        assert length(found) == pytest.approx(bound, rel=1e-10)
        ratio = (bound / length(free)) ** 0.5
        assert_all_close(found, {name: ratio * one for name, one in free.items()})


def test_the_clip_leaves_short_steps_alone():
    run, free = Run(Damped(length=KLClip(1e9)), GROUPS), Run(Damped(length=None), GROUPS)
    gradients, factors = gradients_of(GROUPS), factors_of(GROUPS)
    assert_all_close(run.step(gradients, factors), free.step(gradients, factors), 1e-15)
    still = {name: torch.zeros_like(one) for name, one in gradients.items()}
    found = Run(Damped(length=KLClip()), GROUPS).step(still, factors)
    assert all(float(one.abs().max()) == 0 for one in found.values())


def test_the_clip_weighs_groups_by_their_learning_rates():
    """A group at learning rate zero does not shorten the others."""
    rule, names = Damped(STRENGTH, 0.0, KLClip(1e-3)), ["first", "row"]
    gradients, factors, found = gradients_of(GROUPS), factors_of(GROUPS), []
    for chosen, lrs in ((names, [0.3, 0.0]), (names[:1], [0.3])):
        run = Run(rule, {name: GROUPS[name] for name in chosen})
        run.table.update(1, {name: factors[name] for name in chosen})
        drawn = [gradients[name] for name in chosen]
        directions = rule.directions(drawn, list(run.states.values()), run.bases())
        found.append(rule.lengths(directions, lrs)[0].matrices())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (EigenAdam(), {"m", "v"}),
        (Damped(), {"m", "v"}),
        (Damped(length=KLClip()), {"m"}),
        (Damped(length=None), {"m"}),
        (Damped(momentum=0.0, length=None), set()),
    ],
    ids=lambda one: str(sorted(one)) if isinstance(one, set) else str(one),
)
def test_no_moment_is_kept_that_is_not_needed(rule, kept):
    state = rule.init(torch.ones(1, 2, 3))
    assert set(state) == kept | {"step"}
