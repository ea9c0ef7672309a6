"""Laws of curvature, evidence and predictions on random networks, against dense algebra.

Each law runs twice: on few programs, and on many others if slow tests are asked for; the same ones
each time, or with `--hypothesis-profile=fresh` such as nobody has seen. A program that fails there
belongs into a test of its own, at what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from cases import Attention
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from laws import EXACT, NEGLIGIBLE, REORDERED, relative_error
from posterior import dense
from properties.exact import Dense
from properties.programs import Program, batches_of, data_of, model_of, programs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Curvature, Kron, Laplace, LowRank

STRUCTURES = ("kron", "ekfac", "diag", "full", LowRank(1000))
structures = st.sampled_from(STRUCTURES)
#: With those that depend on how rows come.
any_structure = st.sampled_from([*STRUCTURES, LowRank(2), Kron(1)])
SETTINGS = ("expand", "reduce")


def options(*settings: str) -> st.SearchStrategy:
    """Options of Kronecker factors with one of these settings.

    "auto" picks one of them by the first batch it sees: it belongs where that is the same.
    """
    return st.fixed_dictionaries(
        {"kfac_approx": st.sampled_from(settings), "joint_bias": st.booleans()}
    )


def law(few: int = 8, many: int = 300, **strategies: st.SearchStrategy) -> Callable:
    """A property as two tests: `few` examples, and `many`, under "slow".

    Programs take as long as they take, so there is no deadline.
    """

    def decorated(check: Callable[..., None]) -> Callable[..., None]:
        runs = {}
        for size, examples in (("few", few), ("many", many)):
            profile = settings(
                max_examples=examples,
                deadline=None,
                database=None,
                print_blob=True,
                # A base run says what failed; the slow one shrinks it.
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
            )
            runs[size] = profile(given(**strategies)(check))

        @pytest.mark.parametrize("size", ["few", pytest.param("many", marks=pytest.mark.slow)])
        def test(size: str) -> None:
            runs[size]()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorated


def made(program: Program) -> tuple[nn.Module, Tensor, Tensor]:
    model = model_of(program)
    return model, *data_of(program, model)


def curvature(program: Program, model: nn.Module, batches: Any, **options: Any) -> Curvature:
    fresh = Curvature(model, program.likelihood, class_axis=program.class_axis, **options)
    return fresh.fit(batches)


def posterior(program: Program, model: nn.Module, batches: Any, **options: Any) -> Laplace:
    fresh = Laplace(model, program.likelihood, class_axis=program.class_axis, **options)
    return fresh.fit(batches)


def assert_same(one: Curvature, other: Curvature, tolerance: float, times: float = 1.0) -> None:
    """Blocks of `one`, multiplied, are those of `other`."""
    assert [*one.blocks] == [*other.blocks]
    want = [block.dense() for block in other.blocks.values()]
    floor = NEGLIGIBLE * max(float(block.norm()) for block in want)
    for name, block in zip(one.blocks, want, strict=True):
        error = relative_error(times * one.blocks[name].dense(), block, floor)
        assert error <= tolerance, f"{name}: {error:.2e}"


@law(few=8, program=programs())
def test_exact_structures_are_the_dense_ggn(program):
    """full and all rows: Σ JᵀΛJ; diag: its diagonal. Of what kron has no factors for as well."""
    model, x, y = made(program)
    truth, batches = Dense(program, model, x, y), batches_of(program, x, y)
    floor = NEGLIGIBLE * float(truth.ggn().norm())
    for structure in STRUCTURES:
        found = curvature(program, model, batches, hessian_structure=structure)
        for block in found.blocks.values():
            want = truth.ggn(block.params)
            if block.kind in ("kron", "ekfac"):  # approximations, of which one keeps the trace
                error = float((block.dense().trace() - want.trace()).abs())
                assert structure != "ekfac" or error <= EXACT * max(float(want.trace()), floor)
                continue
            want = want.diagonal().diag() if block.kind == "diag" else want
            assert relative_error(block.dense(), want, floor) < EXACT, (structure, block.params)


@law(program=programs(forms=("rows",)), structure=st.sampled_from(["kron", "ekfac"]))
def test_factors_are_exact_for_one_example_with_one_position(program, structure):
    """N = R = 1: b Λ bᵀ ⊗ a aᵀ is the GGN. Not of a layer that is used twice."""
    model, x, y = made(program)
    x, y = x[:1], y[:1]
    truth = Dense(program, model, x, y)
    floor = NEGLIGIBLE * float(truth.ggn().norm())
    for block in curvature(program, model, [(x, y)], hessian_structure=structure).blocks.values():
        want = truth.ggn(block.params)
        name = program.layers[int(block.params[0].split(".")[0])][0]
        if name == "twice":
            continue
        want = want.diagonal().diag() if block.kind == "diag" else want
        assert relative_error(block.dense(), want, floor) < EXACT, block.params


@law(
    program=programs(),
    structure=st.sampled_from(["kron", "diag", "full", LowRank(1000)]),
    options=options(*SETTINGS),
    fisher=st.sampled_from(["exact", "empirical"]),
    seed=st.integers(0, 5),
)
def test_order_and_batches_do_not_matter(program, structure, options, fisher, seed):
    """One batch, batches of one, and examples in another order give the same sums."""
    model, x, y = made(program)
    options = {"hessian_structure": structure, "fisher": fisher, **options}
    whole = curvature(program, model, [(x, y)], **options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for batches in (
        batches_of(program, x, y),
        list(zip(x.split(1), y.split(1), strict=True)),
        [(x[order], y[order])],
    ):
        # Few rows are taken together by a decomposition, which squares nothing.
        assert_same(curvature(program, model, batches, **options), whole, EXACT)


@law(program=programs(), structure=structures, options=options("auto", *SETTINGS))
def test_data_seen_twice_weigh_twice(program, structure, options):
    """Merged with itself, and fitted to the batches twice over."""
    model, x, y = made(program)
    batches, options = batches_of(program, x, y), {"hessian_structure": structure, **options}
    once = curvature(program, model, batches, **options)
    twice = curvature(program, model, batches + batches, **options)
    assert twice.n_data == 2 * once.n_data
    if structure != "ekfac":  # two fits, each in a basis of its own where eigenvalues are equal
        assert_same(once, twice, EXACT, times=2.0)
    merged = curvature(program, model, batches, **options)
    assert_same(once, merged.merge(once), REORDERED, times=2.0)


@law(program=programs(), structure=any_structure)
def test_any_loader_will_do(program, structure):
    """Lists, generators, mappings, datasets: the same batches are the same curvature."""
    model, x, y = made(program)
    batches, options = batches_of(program, x, y), {"hessian_structure": structure}
    want = curvature(program, model, batches, **options)

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches

    class Loader:
        def __iter__(self) -> Iterator[list[Tensor]]:
            return iter([[x, y] for x, y in batches])

    loaders: list[Any] = [tuple(batches), Loader()]
    loaders += [] if structure == "ekfac" else [once()]
    for loader in loaders:
        assert_same(curvature(program, model, loader, **options), want, 0.0)
    named = [{"inputs": x, "labels": y} for x, y in batches]
    forward = {"forward_fn": lambda model, batch: model(batch["inputs"])}
    assert_same(curvature(program, model, named, **options, **forward), want, REORDERED)
    if structure in STRUCTURES and structure != "ekfac":
        loader = DataLoader(TensorDataset(x, y), len(x), shuffle=True, generator=torch.Generator())
        options["kfac_approx"] = "expand"  # "auto" would go by another first batch
        want = curvature(program, model, batches, **options)
        assert_same(curvature(program, model, loader, **options), want, EXACT)


scales = st.sampled_from([0.5, 1.0, 2.0])


@law(
    program=programs(),
    structure=any_structure,
    delta=st.sampled_from([0.1, 1.0, 10.0]),
    temperature=scales,
    sigma=scales,
)
def test_evidence_is_that_of_the_dense_posterior(program, structure, delta, temperature, sigma):
    """log det by `slogdet`, and the scatter by hand; of the blocks as they are."""
    model, x, y = made(program)
    noise = {"sigma_noise": sigma} if program.likelihood in ("regression", "studentt") else {}
    sigma = noise.get("sigma_noise", 1.0)
    la = posterior(
        program,
        model,
        batches_of(program, x, y),
        hessian_structure=structure,
        prior_precision=delta,
        temperature=temperature,
        **noise,
    )
    want = oracles.evidence(
        la.log_likelihood,
        dense.hessian(la, model),
        dense.theta(la, model),
        dense.delta(la, model),
        sigma=sigma,
        temperature=temperature,
    )
    # Of numbers of order one, up to cancellation between the terms.
    size = 1 + float(la.log_likelihood.abs()) / temperature + float(la.scatter)
    got = float(la.log_marginal_likelihood())
    assert abs(got - float(want)) <= 1e-9 * size


@law(program=programs(), structure=any_structure, delta=st.sampled_from([0.1, 1.0, 10.0]))
def test_functional_variance_is_that_of_the_dense_posterior(program, structure, delta):
    """J P⁻¹ Jᵀ by a dense inverse; of one example as of all."""
    model, x, y = made(program)
    la = posterior(
        program, model, batches_of(program, x, y), hessian_structure=structure,
        prior_precision=delta,
    )  # fmt: skip
    truth = Dense(program, model, x, y)
    names = tuple(dense.covered(la, model))
    j = truth.jacobian[..., truth.columns(names)].unflatten(
        1, (-1, program.outputs)
    )  # (n, t, c, P)
    want = j @ torch.linalg.solve(dense.precision(la, model), j.mT)  # (n, t, c, c)
    got = la.predict(x).covariance_f
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(la.predict(x[-1:]).covariance_f, want[-1:], rtol=1e-8, atol=1e-8)


@law(
    program=programs(likelihoods=("classification",)),
    structure=st.sampled_from([one for one in STRUCTURES if one != "ekfac"]),
    link=st.sampled_from(["probit", "bridge", "centred"]),
    seed=st.integers(0, 5),
)
def test_classes_may_be_renamed(program, structure, link, seed):
    """The head's rows and the labels in another order: probabilities follow.

    Not of EKFAC, whose bases of equal eigenvalues rounding picks.
    """
    if program.layers[-1][0] == "tied":
        return
    model, x, y = made(program)
    classes = program.outputs
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    la = posterior(program, model, batches_of(program, x, y), hessian_structure=structure)
    want = la(x, link_approx=link)
    renamed = model_of(program)
    head = renamed[-1]
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(p[order].clone())
    labels = order.argsort()[y]
    other = posterior(program, renamed, batches_of(program, x, labels), hessian_structure=structure)
    got = other(x, link_approx=link)
    torch.testing.assert_close(got, want[..., order], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        other.log_marginal_likelihood(), la.log_marginal_likelihood(), rtol=1e-9, atol=1e-9
    )


@law(program=programs(), structure=structures)
def test_single_precision_is_near(program, structure):
    """A product of at most a few hundred roundings, each of 6e-8: 1e-4 of the largest block.

    Of EKFAC the trace: where factors have equal eigenvalues, as few examples leave many of zero,
    any basis of their space is one, and rounding picks. Where no gradient passes (normalised, then
    averaged) all is rounding: squares of some 1e-7.
    """
    model, x, y = made(program)
    want = curvature(program, model, batches_of(program, x, y), hessian_structure=structure)
    model = model_of(program).float()
    x, y = (t.float() if t.is_floating_point() else t for t in (x, y))
    got = curvature(program, model, batches_of(program, x, y), hessian_structure=structure)
    assert [*got.blocks] == [*want.blocks]
    largest = max(float(block.dense().norm()) for block in want.blocks.values())
    for name, block in want.blocks.items():
        one, other = got.blocks[name].dense().double(), block.dense()
        difference = (one - other).trace() if block.kind == "ekfac" else (one - other).norm()
        assert float(difference.abs()) <= max(1e-4 * largest, 1e-12) * len(one) ** 0.5, name


class OneWord(nn.Module):
    """Attention over embedded words, pooled."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.table, self.attention = nn.Embedding(5, width), Attention(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(self.table(x)).mean(1))


@pytest.mark.parametrize("length", [2, 3, 4])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_an_example_of_one_word_in_attention(setting, length):
    """Whatever its queries and keys are, outputs stay: their gradients cancel exactly, or nearly.

    Which of the two is chance, and with it whether the example is in the mean of their inputs. What
    holds: output factors are what they are, and a third of the examples moves that mean by as much.
    """
    torch.manual_seed(0)
    model = OneWord().double()
    x = torch.tensor([[0, 4, 1, 2], [4, 3, 0, 1], [3, 3, 3, 3]])[:, :length]
    y = torch.arange(3)
    whole, alone = (
        Curvature(model, "classification", kfac_approx=setting).fit(batches)
        for batches in ([(x, y)], list(zip(x.split(1), y.split(1), strict=True)))
    )
    floor = NEGLIGIBLE * max(float(block.dense().norm()) for block in whole.blocks.values())
    for name, block in whole.blocks.items():
        other = alone.blocks[name]
        if name in ("attention.q.weight", "attention.k.weight"):
            got, want = (float(b.dense().trace()) for b in (other, block))
            assert max(got, want) <= floor or 2 / 3 - EXACT < got / want < 3 / 2 + EXACT
            got, want = other.factors.output, block.factors.output
            assert relative_error(got, want, floor) < EXACT
        else:
            assert relative_error(other.dense(), block.dense(), floor) < EXACT, name
