"""Laws over all rules: what a step does not depend on, and that a stored run goes on bit by bit."""

import copy
import io

import pytest
import torch
from optim.problems import SHAPES, Run, assert_all_close, factors_of, gradients_of

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.optim.rules import (
    AdamNorm,
    AdamW,
    Damped,
    EigenAdam,
    ExactDamping,
    FactoredDamping,
    KLClip,
)

RULES = {
    "eigen": EigenAdam(),
    "graft": Damped(),
    "graft, exact": Damped(ExactDamping(1e-2), 0.8, AdamNorm()),
    "clip": Damped(FactoredDamping(1e-2), 0.9, KLClip(1e-3)),
    "clip, exact": Damped(ExactDamping(1e-2), 0.0, KLClip(1e-3)),
    "bare": Damped(FactoredDamping(1e-2), 0.9, None),
    "bare, exact": Damped(ExactDamping(1e-2), 0.9, None),
}
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def steps_of(rule, problems, shapes=SHAPES, **options):
    """The updates of every step."""
    run = Run(rule, shapes, **options)
    return [run.step(gradients, factors) for gradients, factors in problems]


def problems_of(count=5, shapes=SHAPES):
    return [(gradients_of(shapes), factors_of(shapes)) for _ in range(count)]


def transformed(problems, lefts, rights):
    """G → R G Sᵀ, B → R B Rᵀ, A → S A Sᵀ with R and S of each group."""
    return [
        (
            {name: lefts[name] @ one @ rights[name].mT for name, one in gradients.items()},
            {
                name: (lefts[name] @ b @ lefts[name].mT, rights[name] @ a @ rights[name].mT)
                for name, (b, a) in factors.items()
            },
        )
        for gradients, factors in problems
    ]


def assert_commutes(rule, lefts, rights):
    """Eigenvectors of close eigenvalues lose digits, hence not 1e-10: 1e-8 of the largest entry."""
    problems = problems_of()
    found = steps_of(rule, transformed(problems, lefts, rights))
    for step, expected in zip(found, steps_of(rule, problems), strict=True):
        turned = {name: lefts[name] @ one @ rights[name].mT for name, one in expected.items()}
        assert_all_close(step, turned, 1e-8)


def permutations(d, b):
    return torch.stack([torch.eye(d)[torch.randperm(d)] for _ in range(b)]).double()


def rotations(d, b):
    return torch.linalg.qr(torch.randn(b, d, d).double()).Q


@ALL
def test_a_permutation_of_units_commutes_with_every_step(rule):
    lefts = {name: permutations(o, b) for name, (b, o, _) in SHAPES.items()}
    rights = {name: permutations(i, b) for name, (b, _, i) in SHAPES.items()}
    assert_commutes(rule, lefts, rights)


@pytest.mark.parametrize("name", [name for name in RULES if "graft" not in name])
def test_other_orthonormal_coordinates_of_a_layer_commute_with_every_step(name):
    """Under EigenAdam too, as the eigenbases turn along. Adam's norm is one of coordinates."""
    lefts = {name: rotations(o, b) for name, (b, o, _) in SHAPES.items()}
    rights = {name: rotations(i, b) for name, (b, _, i) in SHAPES.items()}
    assert_commutes(RULES[name], lefts, rights)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
@pytest.mark.parametrize(
    "rule", [EigenAdam(eps=0.0), Damped(0.0, 0.9, AdamNorm(0.95, 0.0))], ids=str
)
def test_the_scale_of_the_loss_drops_out(rule, scale):
    """Gradients and B are as large as the loss; ε and λ would be in its units."""
    problems = problems_of()
    scaled = [
        (
            {name: scale * one for name, one in gradients.items()},
            {name: (scale * b, a) for name, (b, a) in factors.items()},
        )
        for gradients, factors in problems
    ]
    pairs = zip(steps_of(rule, scaled), steps_of(rule, problems), strict=True)
    for found, expected in pairs:
        assert_all_close(found, expected, 1e-8)


@pytest.mark.parametrize("damping", [ExactDamping, FactoredDamping])
def test_damping_is_in_the_units_of_the_curvature(damping):
    """Gradients, B and λ times c: nothing changes without grafting either."""
    (problem,) = problems_of(1)
    gradients, factors = problem
    scaled = {name: 8 * one for name, one in gradients.items()}
    larger = {name: (8 * b, a) for name, (b, a) in factors.items()}
    expected = steps_of(Damped(damping(0.01), 0.9, None), [problem])
    found = steps_of(Damped(damping(0.08), 0.9, None), [(scaled, larger)])
    assert_all_close(found[0], expected[0])


@pytest.mark.parametrize("name", [name for name in RULES if "clip" not in name])
def test_a_group_moves_as_it_does_without_the_others(name):
    """But under a clip, which all of them share."""
    rule, problems = RULES[name], problems_of()
    together = steps_of(rule, problems)
    for name, shape in SHAPES.items():
        own = [({name: gs[name]}, {name: fs[name]}) for gs, fs in problems]
        for found, expected in zip(steps_of(rule, own, {name: shape}), together, strict=True):
            assert_all_close(found, {name: expected[name]})


@ALL
def test_gradients_and_factors_are_left_as_they_are(rule):
    problems = problems_of(3)
    before = copy.deepcopy(problems)
    steps_of(rule, problems)
    for (gradients, factors), (old_gradients, old_factors) in zip(problems, before, strict=True):
        for name in SHAPES:
            assert torch.equal(gradients[name], old_gradients[name])
            assert all(map(torch.equal, factors[name], old_factors[name]))


@ALL
def test_updates_in_float32_are_those_in_float64(rule):
    """To 2e-3 of the largest entry: v̂ of small entries and inverses by λ lose up to four digits."""
    problems = problems_of(3)
    single = [
        (
            {name: one.float() for name, one in gradients.items()},
            {name: tuple(one.float() for one in pair) for name, pair in factors.items()},
        )
        for gradients, factors in problems
    ]
    found = steps_of(rule, single, dtype=torch.float32)
    for step, expected in zip(found, steps_of(rule, problems), strict=True):
        assert all(one.dtype == torch.float32 for one in step.values())
        assert_all_close({name: one.double() for name, one in step.items()}, expected, 2e-3)


def stored_and_read(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@ALL
@pytest.mark.parametrize("largest", [4096, 3])
def test_a_run_that_is_resumed_after_any_step_goes_on_bit_by_bit(rule, largest):
    """Weights, moments and bases are stored; every phase of the schedule, before and after 7."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "large"}
    problems, last = problems_of(15, shapes), 14
    run, saved = Run(rule, shapes, every=5, largest=largest), []
    for gradients, factors in problems:
        saved.append(stored_and_read((run.weights, run.states, run.table.state_dict())))
        run.step(gradients, factors)
    for steps, (weights, states, table) in enumerate(saved):
        again = Run(rule, shapes, every=5, largest=largest)
        again.weights, again.states, again.steps = weights, states, steps
        again.table.load_state_dict(table)
        for gradients, factors in problems[steps : last + 1]:
            again.step(gradients, factors)
        assert all(torch.equal(again.weights[name], run.weights[name]) for name in shapes)


@ALL
def test_factors_that_are_not_finite_do_not_reach_the_weights(rule):
    run = Run(rule, SHAPES, every=1)
    for bad in (torch.inf, None, torch.nan):
        gradients, factors = gradients_of(SHAPES), factors_of(SHAPES)
        if bad is not None:
            factors = {name: (b * bad, a * bad) for name, (b, a) in factors.items()}
        run.step(gradients, factors)
        assert all(bool(torch.isfinite(one).all()) for one in run.weights.values())


@ALL
def test_a_step_of_no_groups(rule):
    run = Run(rule, {})
    assert run.step({}, {}) == {}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EigenAdam(betas=(1.0, 0.9)), InvalidValue, "betas"),
        (lambda: AdamW(betas=(0.9, -0.1)), InvalidValue, "betas"),
        (lambda: AdamW(eps=-1.0), InvalidValue, "eps"),
        (lambda: EigenAdam(eps="small"), InvalidType, "eps"),
        (lambda: Damped(-1.0), InvalidValue, "damping"),
        (lambda: Damped(ExactDamping(float("nan"))), InvalidValue, "damping"),
        (lambda: Damped("prior"), InvalidType, "damping"),
        (lambda: Damped(momentum=1.0), InvalidValue, "momentum"),
        (lambda: Damped(length="adam"), InvalidType, "length"),
        (lambda: Damped(length=KLClip(0.0)), InvalidValue, "KLClip"),
        (lambda: AdamNorm(beta=True), InvalidType, "beta"),
    ],
)
def test_rules_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
