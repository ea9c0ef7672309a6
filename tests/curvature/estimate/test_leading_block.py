"""Wide Kronecker factors by few directions: "kron" where all rows fit, and bounded elsewhere."""

from __future__ import annotations

import numpy
import pytest
import torch
from cases import KINDS, Case, build
from laws import EXACT, REORDERED, Untouched, dense_blocks, fitted, relative_error
from posterior import dense
from torch import nn

from kfac_laplace import Curvature, Kron, Laplace, MarglikTuner
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.optim import KFAC

WIDE = ("mlp-tanh", "cnn", "vit", "tokens", "twice", "mlp-regression")


def wide(n: int = 40, i: int = 24, classes: int = 12) -> Case:
    """Both factors of the first layer are wide, and those of the head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(i, 20), nn.Tanh(), nn.Linear(20, classes)).double()
    x, y = torch.randn(n, i, dtype=torch.float64), torch.randint(0, classes, (n,))
    return Case(model, "classification", [*zip(x.split(16), y.split(16), strict=True)])


def sides(block):
    """A, not divided by its count, and B, as numpy matrices."""
    factors, count = block.factors, block.input_count[:, None, None]
    return [each.numpy() for each in (factors.input * count, factors.output)]


def nearest(matrix, rank):
    """Leading eigenvectors as they are, the mean of the other eigenvalues for all others."""
    if matrix.shape[-1] <= 2 * rank:
        return matrix
    values, vectors = numpy.linalg.eigh(matrix)
    values[..., :-rank] = values[..., :-rank].mean(-1, keepdims=True)
    return (vectors * values[..., None, :]) @ vectors.swapaxes(-1, -2)


# --- where nothing is left out -------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_where_no_factor_is_wide_it_is_kron(name):
    case, want = build(name), dense_blocks(fitted(name))
    untouched = Untouched(case.model)
    got = fitted(case, hessian_structure=Kron(1000))
    untouched.check()
    assert [*got.blocks] == [*want]
    for key, block in got.blocks.items():
        assert relative_error(block.dense(), want[key]) < REORDERED
        assert isinstance(block, LeadingBlock) == (got.coverage[block.params[0]] == "kron")


def test_with_a_direction_for_every_row_it_is_kron():
    """Twelve examples, of which wide factors keep twelve rows."""
    case = wide(n=12, i=60)
    want = fitted(case)
    got = fitted(case, hessian_structure=Kron(12))
    block = got.blocks["0.weight"]
    assert block.has_wide_input and not block.has_wide_output
    assert block.input_rows.shape == (1, 12, 61) and float(block.input_rest) == 0
    for key, other in want.blocks.items():
        assert relative_error(got.blocks[key].dense(), other.dense()) < EXACT
    la = Laplace(case.model, "classification").fit(case.batches)
    few = Laplace(case.model, "classification", hessian_structure=Kron(12)).fit(case.batches)
    torch.testing.assert_close(few.log_marginal_likelihood(), la.log_marginal_likelihood())
    torch.testing.assert_close(few.predict(case.x).covariance_f, la.predict(case.x).covariance_f)


# --- where something is --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_rows_that_are_waited_for_leave_the_nearest_with_the_same_traces(setting):
    """No more rows than twice the rank are cut once, by numpy of the factors of "kron"."""
    torch.manual_seed(0)
    layers = [nn.Linear(15, 14), nn.Tanh(), nn.Flatten(), nn.Linear(28, 1)]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(4, 2, 15, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)
    case = Case(model, "regression", [(x, y)])
    rank = 4 if setting == "expand" else 3
    whole = fitted(case, kfac_approx=setting)
    found = fitted(case, kfac_approx=setting, hessian_structure=Kron(rank))
    block = found.blocks["0.weight"]
    assert block.has_wide_input and block.has_wide_output
    assert float(block.input_rest) > 0 and float(block.output_rest) > 0
    for key, other in whole.blocks.items():
        for got, want in zip(sides(found.blocks[key]), sides(other), strict=True):
            close = numpy.linalg.norm(got - nearest(want, rank)) / numpy.linalg.norm(want)
            assert close < EXACT, key


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", WIDE)
def test_of_many_batches_traces_are_exact_and_what_is_left_out_is_bounded(name, rank):
    whole, found = fitted(name), fitted(name, hessian_structure=Kron(rank))
    for key, block in found.blocks.items():
        if not isinstance(block, LeadingBlock):
            continue
        other = whole.blocks[key]
        torch.testing.assert_close(block.dense().trace(), other.dense().trace(), rtol=1e-9, atol=0)
        rows = [block.input_rows, block.output_rows]
        rests = [block.input_rest, block.output_rest]
        for want, kept, rest, is_wide in zip(
            sides(other), rows, rests, (block.has_wide_input, block.has_wide_output), strict=True
        ):
            if is_wide:
                left = torch.as_tensor(want) - kept.mT @ kept
                values = torch.linalg.eigvalsh(left)
                rounding = 1e-12 * float(numpy.trace(want, axis1=-2, axis2=-1).sum())
                assert kept.shape[1] <= rank
                assert float(values.min()) >= -rounding
                assert bool((values.amax(-1) <= rest + rounding).all())


def test_the_head_has_the_nearest_too():
    """Its B is known without rows; below it, vectors begin at its input."""
    case = wide(classes=30)
    batches = [(case.x, case.y)]
    whole, found = fitted(case, batches), fitted(case, batches, hessian_structure=Kron(5))
    got, want = (each.blocks["2.weight"] for each in (found, whole))
    assert got.has_wide_output
    one, other = sides(got)[1], sides(want)[1]
    assert numpy.allclose(one, nearest(other, 5), rtol=0, atol=1e-12 * numpy.trace(other[0]))


@pytest.mark.parametrize("name", WIDE)
def test_eigenvalues_and_turns_are_those_of_the_matrix(name):
    for block in fitted(name, hessian_structure=Kron(2)).blocks.values():
        values = torch.linalg.eigvalsh(block.dense())
        size = float(values[-1])
        torch.testing.assert_close(block.eigenvalues(), values, rtol=1e-10, atol=1e-13 * size)
        spectrum, order = block.spectrum, block.layout.order
        units = torch.eye(len(values), dtype=torch.float64)
        packed = units[order.argsort()] if len(order) else units
        b, o, i = block.layout.matrix
        turned = spectrum.to_eigenbasis(packed.mT.reshape(-1, b, o, i)).flatten(1)
        again = (turned * spectrum.values.flatten()) @ turned.mT
        torch.testing.assert_close(again, block.dense(), rtol=1e-9, atol=1e-12 * size)
        back = spectrum.from_eigenbasis(turned.unflatten(1, (b, o, i))).flatten(1)
        torch.testing.assert_close(back, packed.mT, rtol=0, atol=1e-12)


def test_the_determinant_is_no_less_than_that_of_kron():
    """log det is concave: the mean of eigenvalues in place of each raises it."""
    case = wide()
    batches = [(case.x, case.y)]
    structures = ("kron", Kron(8), Kron(4), Kron(2))
    fits = [Laplace(case.model, "classification", hessian_structure=one) for one in structures]
    ratios = [float(la.fit(batches).log_det_ratio) for la in fits]
    assert ratios == sorted(ratios) and ratios[0] < ratios[-1]


@pytest.mark.parametrize("rank", [2, 5])
def test_posteriors_are_those_of_the_matrices(rank):
    """Determinants and variances by dense algebra, samples by their moments."""
    case = wide()
    la = Laplace(
        case.model, "classification", hessian_structure=Kron(rank), prior_precision=0.7
    ).fit(case.batches)
    precision = dense.precision(la, case.model)
    ratio = torch.linalg.slogdet(precision)[1] - dense.delta(la, case.model).log().sum()
    torch.testing.assert_close(la.log_det_ratio, ratio)
    x = case.x[:5]
    names = dense.covered(la, case.model)
    parameters = {name: case.model.get_parameter(name).detach() for name in names}
    jacobian = torch.func.jacrev(lambda own: torch.func.functional_call(case.model, own, (x,)))
    j = torch.cat([each.flatten(2) for each in jacobian(parameters).values()], -1)
    want = j @ torch.linalg.solve(precision, j.mT)
    torch.testing.assert_close(la.predict(x).covariance_f[:, 0], want, rtol=1e-9, atol=1e-9)
    draws = la.sample(4000, generator=torch.Generator().manual_seed(0)).double()
    whitened = (draws - dense.theta(la, case.model)) @ torch.linalg.cholesky(precision)
    p = whitened.shape[1]
    # Mean squares of standard normal numbers, within five standard errors.
    assert abs(float(whitened.square().mean()) - 1) < 5 * (2 / (4000 * p)) ** 0.5


# --- sums, files, and what it goes with ----------------------------------------------------------


def test_two_data_sets_add_and_weigh():
    case = wide()
    parts = [fitted(case, [batch], hessian_structure=Kron(4)).ggn for batch in case.batches]
    whole = fitted(case)
    for total in ((parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])):
        for key, block in total.blocks.items():
            want = whole.blocks[key].dense().trace()
            torch.testing.assert_close(block.dense().trace(), want)
    half = parts[0].scaled(0.5)
    for key, block in half.blocks.items():
        torch.testing.assert_close(block.dense(), 0.5 * parts[0].blocks[key].dense())
        nothing = block.zero()
        assert float(nothing.dense().abs().sum()) == 0
    average = parts[0].scaled(0.5) + parts[1]
    assert average.n_data == 0.5 * 16 + 16


def test_tuning_takes_it():
    case = wide()
    tuner = MarglikTuner(case.model, "classification", n_data=40, hessian_structure=Kron(4))
    optimizer = torch.optim.Adam(case.model.parameters(), lr=1e-2)
    for _ in range(2):
        for x, y in case.batches:
            optimizer.zero_grad()
            tuner.loss(case.model(x), y).backward()
            optimizer.step()
        tuner.step(case.batches)
    assert isinstance(tuner.laplace(case.batches).curvature.blocks["0.weight"], LeadingBlock)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("pt", None), ("safetensors", None), ("safetensors", torch.float32)]
)
def test_files_hold_it(suffix, dtype, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    case, path = wide(), tmp_path / f"la.{suffix}"
    la = Laplace(case.model, "classification", hessian_structure=Kron(4)).fit(case.batches)
    la.save(path, dtype=dtype)
    again = Laplace.load(path, case.model)
    assert again.options.hessian_structure == Kron(4)
    tolerance = {} if dtype is None else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(again(case.x), la(case.x), **tolerance)
    again.fit(case.batches, override=False)
    assert again.n_data == 80
    assert f"share of the trace held {share(la):.4g}" in " ".join(la.summary().split())


def share(la):
    """By the dense factors."""
    held = whole = 0.0
    for block in la.curvature.blocks.values():
        rows = (block.input_rows, block.output_rows)
        inputs, outputs = (
            float(torch.as_tensor(m).diagonal(0, -2, -1).sum()) for m in sides(block)
        )
        kept = [
            float(own.square().sum()) if is_wide else total
            for own, total, is_wide in zip(
                rows, (inputs, outputs), (block.has_wide_input, block.has_wide_output), strict=True
            )
        ]
        held, whole = held + kept[0] * kept[1], whole + inputs * outputs
    return held / whole


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_is_above_zero(rank):
    with pytest.raises(ValueError, match="rank"):
        Kron(rank)


@pytest.mark.parametrize("rank", [2.5, True, "4"])
def test_a_rank_is_a_whole_number(rank):
    with pytest.raises(TypeError, match="rank"):
        Kron(rank)


def test_another_rank_is_another_structure():
    case = wide()
    one, other = (fitted(case, hessian_structure=Kron(rank)) for rank in (3, 4))
    with pytest.raises(ValueError, match=r"Kron\(rank=4\).*into.*Kron\(rank=3\)"):
        one.merge(other)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("input_rows", torch.ones(1, 5, 25, dtype=torch.float64), "more directions than rank 4"),
        ("input_rows", torch.ones(1, 4, 24, dtype=torch.float64), "input_rows"),
        ("input_sum", torch.ones(1, 25, 13, dtype=torch.float64), "input_sum"),
        ("output_rest", -torch.ones(1, dtype=torch.float64), "negative"),
        ("input_rest", torch.ones(2, dtype=torch.float64), "input_rest"),
        ("input_rest", None, "input_rest"),
    ],
)
def test_blocks_that_are_none_are_refused(name, value, said):
    curvature = fitted(wide(), hessian_structure=Kron(4))
    state = curvature.state_dict()
    state["ggn"]["blocks"]["0.weight"][name] = value
    with pytest.raises(ValueError, match=said):
        Curvature.from_state(state, curvature.network.model, curvature.options)


def test_the_optimiser_shares_whole_factors_alone():
    case = wide()
    optimizer = KFAC(case.model, "classification", weight_decay=0)
    with pytest.raises(ValueError, match=r"Kron\(rank=4\)"):
        MarglikTuner(
            case.model, "classification", n_data=40, hessian_structure=Kron(4), curvature=optimizer
        )
