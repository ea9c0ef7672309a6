"""Blocks, evidence and leave-one-out under loss options, against dense algebra."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case, build
from laws import EXACT, relative_error, seeded_case
from likelihoods.losses import (
    STRUCTURES,
    WEIGHT,
    dense_ggn,
    each,
    example,
    fit,
    jacobian,
    loss,
    output_curvature,
)
from posterior import dense
from torch import Tensor, nn

from kfac_laplace import Bernoulli, Categorical, Laplace
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points


@each
def test_dense_structures_are_exact(name, likelihood):
    case = example(name, likelihood)
    for structure in ("diag", "full"):
        la = fit(case, hessian_structure=structure)
        for block in la.curvature.blocks.values():
            want = dense_ggn(case, list(block.params))
            want = want.diagonal().diag() if structure == "diag" else want
            # Key biases have no curvature: softmax ignores a shift of all scores.
            floor = 1e-6 * dense_ggn(case, la.curvature.params).norm().item()
            assert relative_error(block.dense(), want, floor) < EXACT, block.params


def test_pixels_with_classes_on_axis_one():
    """255 marks pixels without a label, as segmentation data have it."""
    plain = seeded_case(lambda: nn.Conv2d(2, 3, 2), (2, 3, 4))
    y = torch.randint(0, 3, (len(plain.x), 2, 3), generator=torch.Generator().manual_seed(0))
    y[:, 0] = 255
    likelihood = Categorical(ignore_index=255, weight=WEIGHT)
    case = Case(plain.model, likelihood, [(plain.x, y)])
    la = fit(case, hessian_structure="full")
    want = dense_ggn(case, la.curvature.params)
    assert relative_error(la.curvature.blocks["full"].dense(), want) < EXACT
    torch.testing.assert_close(la.log_likelihood, -loss(likelihood, case.model(case.x), y).detach())


@each
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_kronecker_blocks_follow_the_formula(name, likelihood, setting):
    """A is over the tokens that some output in the loss depends on, B over those in the loss."""
    case = example(name, likelihood)
    la = fit(case, kfac_approx=setting)
    kind = "binary" if isinstance(likelihood, Bernoulli) else "classification"
    floor = 1e-6 * max(b.dense().norm().item() for b in la.curvature.blocks.values())
    for weight, block in la.curvature.blocks.items():
        layer = weight.removesuffix(".weight")
        a, b = oracles.layer_tensors(case.model, layer, case.x, case.y, kind)
        want = oracles.kfac_block(
            kfac_factors(a[:, :, 0], b[:, :, 0], case, setting), bias_column=True
        )
        assert relative_error(block.dense(), want, floor) < EXACT, weight


def kfac_factors(a: Tensor, b: Tensor, case: Case, setting: str) -> oracles.Factors:
    """Factors from inputs a (n, t, i) and gradients b (n, t, o, k), without the dead tokens."""
    hessian = output_curvature(case)[0]
    in_loss = hessian.diagonal(dim1=1, dim2=2) != 0
    live = (b * in_loss[:, None, None]).flatten(2).any(-1)  # (n, t)
    if a.shape[1] == 1:  # an example of one row counts as soon as one of its labels does
        live = in_loss.any(1, keepdim=True)
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1) * live[..., None]
    count = live.sum()
    if setting == "reduce":
        number = live.sum(1)
        a = a.sum(1, keepdim=True) / number.clamp_min(1)[:, None, None]
        b, count = b.sum(1, keepdim=True), (number > 0).sum()
    return oracles.Factors(
        torch.einsum("nti,ntj->ij", a, a)[None] / count,
        torch.einsum("ntok,nkl,ntpl->op", b, hessian, b)[None],
    )


@each
@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_takes_the_loss_as_it_stands(name, likelihood, structure):
    case = example(name, likelihood)
    la = fit(case, hessian_structure=structure, prior_precision=0.7, temperature=0.5)
    hessian = dense.hessian(la, case.model)
    if structure == "full":
        hessian = dense_ggn(case, la.curvature.params)
    log_likelihood = -loss(likelihood, case.model(case.x).detach(), case.y)
    torch.testing.assert_close(la.log_likelihood, log_likelihood)
    delta = dense.delta(la, case.model)
    want = oracles.evidence(
        log_likelihood, hessian, dense.theta(la, case.model), delta, temperature=0.5
    )
    torch.testing.assert_close(la.log_marginal_likelihood(), want)


@pytest.mark.slow
def test_monte_carlo_blocks_are_unbiased():
    """Every entry of the exact diagonal within four standard errors over 100 seeds."""
    case = example("tokens", Categorical(weight=WEIGHT, label_smoothing=0.3))
    options = {"hessian_structure": "diag"}

    def diagonal(la: Laplace) -> Tensor:
        return torch.cat([b.dense().diagonal() for b in la.curvature.blocks.values()])

    want = diagonal(fit(case, **options))
    draws = torch.stack([diagonal(fit(case, fisher="mc", seed=s, **options)) for s in range(100)])
    error = (draws.mean(0) - want).abs()
    # an entry without any curvature (key biases) is right to rounding
    assert (error <= 4 * draws.std(0) / 10 + 1e-14).all()


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_ignored_examples_are_examples_left_out(structure):
    case = example("mlp-tanh", Categorical())
    kept = case.y != -100
    assert 0 < kept.sum() < len(kept)
    with_them = fit(case, hessian_structure=structure)
    without = Laplace(case.model, hessian_structure=structure).fit([(case.x[kept], case.y[kept])])
    for name, block in with_them.curvature.blocks.items():
        torch.testing.assert_close(block.dense(), without.curvature.blocks[name].dense())
    torch.testing.assert_close(
        with_them.log_marginal_likelihood(), without.log_marginal_likelihood()
    )


@pytest.mark.parametrize("structure", ["diag", "full"])
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-binary"])
def test_integer_weights_are_repeated_examples(name, structure):
    case = build(name)
    if name == "mlp-binary":
        likelihood, counts = Bernoulli(pos_weight=3), 1 + 2 * case.y.flatten().long()
    else:
        likelihood, counts = Categorical(weight=[1, 3, 2]), torch.tensor([1, 3, 2])[case.y]
    weighted = Laplace(case.model, likelihood, hessian_structure=structure).fit(case.batches)
    repeated = Laplace(case.model, case.likelihood, hessian_structure=structure)
    repeated.fit([(case.x.repeat_interleave(counts, 0), case.y.repeat_interleave(counts, 0))])
    assert weighted.n_data < repeated.n_data
    torch.testing.assert_close(
        weighted.log_marginal_likelihood(), repeated.log_marginal_likelihood()
    )


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_data_whose_labels_are_all_ignored_leave_the_prior(structure, fisher):
    case = example("tokens", Categorical())
    la = Laplace(case.model, hessian_structure=structure, fisher=fisher).fit(case.batches[-1:])
    assert not dense.hessian(la, case.model).any()
    assert float(la.log_likelihood) == 0 and abs(float(la.log_det_ratio)) < 1e-12
    assert torch.isfinite(la(case.x)).all()


@each
def test_leave_one_out_moments_equal_dense_algebra(name, likelihood):
    """f + S g and S = J (P - J^T H J)^-1 J^T, with H and g those of torch's loss."""
    case = example(name, likelihood)
    la = fit(case, hessian_structure="full", prior_precision=0.7)
    points = leave_one_out_points(la.posterior, case.batches, "labels", seed=0)
    output = case.model(case.x).detach().flatten(1)
    hessian, gradient = output_curvature(case)
    j = jacobian(case, la.curvature.params)
    precision = dense.precision(la, case.model)
    for n in range(len(output)):
        own = j[n].T @ hessian[n] @ j[n]
        covariance = j[n] @ torch.linalg.solve(precision - own, j[n].T)
        want = output[n] + covariance @ gradient[n]
        torch.testing.assert_close(points.mean[n].flatten(), want, rtol=1e-9, atol=1e-9)


def test_infinite_outputs_at_ignored_rows_are_refused():
    """A backward pass through them would carry NaN into every weight."""
    case = example("tokens", Categorical())
    x = case.x.clone()
    x[-1] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        Laplace(case.model).fit([(x, case.y)])
