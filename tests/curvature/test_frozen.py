"""GGNs are values: batches make new ones, refused batches none, sums and averages are functions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import build

from kfac_laplace import Curvature, Laplace
from kfac_laplace.errors import InvalidValue, KfacLaplaceError

STRUCTURES = ["kron", "diag", "full"]
NAMES = ["mlp-tanh", "cnn", "vit", "tokens"]


def fitted(name: str, structure: str = "kron", batches: slice = slice(None)) -> Curvature:
    case = build(name)
    curvature = Curvature(case.model, case.likelihood, hessian_structure=structure)
    return curvature.fit(case.batches[batches])


def dense(ggn) -> dict[str, torch.Tensor]:
    return {name: block.dense().clone() for name, block in ggn.blocks.items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_later_batches_leave_an_earlier_ggn_as_it_was(name, structure):
    case = build(name)
    curvature = Curvature(case.model, case.likelihood, hessian_structure=structure)
    curvature.accumulate(*case.batches[0])
    early, before = curvature.ggn, dense(curvature.ggn)
    statistic, n_data = early.statistic.clone(), early.n_data
    curvature.fit(case.batches[1:])
    assert curvature.ggn is not early and early.n_data == n_data
    assert torch.equal(early.statistic, statistic)
    for name_, matrix in dense(early).items():
        assert torch.equal(matrix, before[name_])


def test_ggn_and_knowledge_cannot_be_written():
    ggn = fitted("mlp-tanh").ggn
    for value in (ggn, ggn.knowledge, ggn.options, *ggn.blocks.values()):
        for field in dataclasses.fields(value):
            with pytest.raises(AttributeError):
                setattr(value, field.name, None)


@pytest.mark.parametrize("fault", ["inputs", "targets", "shape"])
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_batch_assigns_nothing(fault, first):
    case = build("vit")
    curvature = Curvature(case.model, case.likelihood, fisher="mc")
    if not first:
        curvature.accumulate(*case.batches[0])
    before, draws = curvature.ggn, curvature.generator.get_state()
    x, y = (tensor.clone() for tensor in case.batches[1])
    if fault == "inputs":
        x[0] = torch.nan
    elif fault == "targets":
        y[0] = 99
    else:
        y = y[:2]
    with pytest.raises(KfacLaplaceError):
        curvature.accumulate(x, y)
    assert curvature.ggn is before
    assert torch.equal(curvature.generator.get_state(), draws)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_the_sum_is_that_of_both_data_sets(name, structure):
    """Whatever the block: of Kronecker blocks A is averaged and B summed."""
    one, other = fitted(name, structure, slice(0, 1)), fitted(name, structure, slice(1, None))
    both, whole = one.ggn + other.ggn, fitted(name, structure).ggn
    assert (both.n_data, both.n_rows, both.n_outputs) == (
        whole.n_data,
        whole.n_rows,
        whole.n_outputs,
    )
    for key, block in both.blocks.items():
        torch.testing.assert_close(block.dense(), whole.blocks[key].dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(both.statistic, whole.statistic)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_scales_every_block(name, structure):
    ggn = fitted(name, structure).ggn
    for weight in (0.25, 3.0):
        scaled = ggn.scaled(weight)
        for key, block in scaled.blocks.items():
            expected = weight * ggn.blocks[key].dense()
            torch.testing.assert_close(block.dense(), expected, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                block.eigenvalues(), torch.linalg.eigvalsh(expected), rtol=1e-8, atol=1e-10
            )
        assert scaled.n_data == weight * ggn.n_data


@pytest.mark.parametrize("name", NAMES)
def test_a_moving_average_weighs_factors_by_their_counts(name):
    """ρ · old + new: B is the weighted sum, A the average of the rows, old ones counting ρ each."""
    old, new = fitted(name, batches=slice(0, 1)).ggn, fitted(name, batches=slice(1, 2)).ggn
    decay = 0.3
    mean = old.scaled(decay) + new
    for key, block in mean.blocks.items():
        a, b = old.blocks[key], new.blocks[key]
        if block.kind != "kron":
            expected = decay * a.dense() + b.dense()
            torch.testing.assert_close(block.dense(), expected, rtol=1e-12, atol=1e-14)
            continue
        na, nb = float(a.input_count[0]), float(b.input_count[0])
        inputs = (decay * na * a.factors.input + nb * b.factors.input) / (decay * na + nb)
        outputs = decay * a.factors.output + b.factors.output
        torch.testing.assert_close(block.factors.input, inputs, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(block.factors.output, outputs, rtol=1e-12, atol=1e-14)
    assert mean.n_data == pytest.approx(decay * old.n_data + new.n_data)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(InvalidValue, match="weight"):
        fitted("mlp-tanh").ggn.scaled(weight)


def test_nothing_adds_nothing_on_either_side():
    ggn = fitted("cnn").ggn
    for total in (ggn + ggn.without_data(), ggn.without_data() + ggn):
        assert total.n_data == ggn.n_data
        assert all(torch.equal(b.dense(), ggn.blocks[k].dense()) for k, b in total.blocks.items())


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_the_log_likelihood_of_a_weight_is_that_much(weight):
    """Also where no whole number of outputs is left."""
    case = build("mlp-regression")
    la = Laplace(case.model, case.likelihood, sigma_noise=0.7).fit(case.batches)
    full = float(la.log_likelihood)
    la.curvature.ggn = la.curvature.ggn.scaled(weight)
    assert float(la.log_likelihood) == pytest.approx(weight * full, rel=1e-12)


def test_sums_stay_on_the_device_of_the_latest_batch():
    """A batch's statistic is not fetched from its device: here from one that has no data."""
    curvature = fitted("mlp-tanh")
    nothing, batch = curvature.ggn.without_data(), curvature.ggn
    moved = dataclasses.replace(batch, statistic=batch.statistic.to("meta"))
    assert moved.after(nothing).statistic.device.type == "meta"


def test_sums_of_different_kinds_are_refused():
    kron, diagonal = fitted("mlp-tanh").ggn, fitted("mlp-tanh", "diag").ggn
    with pytest.raises(InvalidValue, match="merge"):
        _ = kron + diagonal


def test_a_copy_and_its_original_go_apart():
    case = build("cnn")
    first = Curvature(case.model, case.likelihood, fisher="mc").fit(case.batches[:1])
    second = first.copy()
    assert second.ggn is first.ggn
    second.fit(case.batches[1:])
    assert (first.n_data, second.n_data) == (3, 7)
    again = Curvature(case.model, case.likelihood, fisher="mc").fit(case.batches)
    for key, block in again.blocks.items():  # draws went on where they were
        assert torch.equal(block.dense(), second.blocks[key].dense())
