"""The posterior of every network of the zoo: evidence, prior, predictions, samples.

The yardstick is dense algebra over the blocks, with Jacobians by autograd.
"""

from __future__ import annotations

import math

import pytest
import torch
from laws import Untouched
from torch import Tensor, nn
from zoo.brute_force import Oracle
from zoo.case import BUILDERS, N_DATA
from zoo.fitting import fit, fitted, oracle_of, zoo_law

from kfac_laplace import Laplace


@zoo_law
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_evidence_does_not_depend_on_the_batches(name, setting):
    case, sizes = oracle_of(name).case, {"expand": (2, 4, 1), "reduce": (N_DATA,)}
    got, want = fitted(case, sizes[setting], kfac_approx=setting), fit(name, kfac_approx=setting)
    assert got.n_data == want.n_data == N_DATA
    for term in ("log_likelihood", "log_det_ratio", "log_det_posterior_precision"):
        torch.testing.assert_close(
            getattr(got, term), getattr(want, term), rtol=case.tolerance, atol=case.tolerance
        )


@pytest.mark.parametrize("name", [n for n in BUILDERS if n.endswith(("-graph", "-node"))])
def test_graphs_may_come_one_by_one(name):
    """A graph without a batch vector is one example."""
    case, want = oracle_of(name).case, fit(name)
    la = Laplace(case.model, case.likelihood, **case.options).fit(case.examples)
    assert la.n_data == N_DATA
    torch.testing.assert_close(
        la.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-11, atol=1e-11
    )


@zoo_law
def test_evidence_is_that_of_the_blocks(name):
    """Every term by dense algebra, the log-likelihood by torch's own loss."""
    oracle, la = oracle_of(name), fit(name)
    torch.testing.assert_close(
        la.log_likelihood.double(), log_likelihood(oracle), rtol=1e-12, atol=0
    )
    blocks = [block.dense().double() for block in la.curvature.blocks.values()]
    ratio = sum(
        torch.linalg.slogdet(h + torch.eye(len(h), dtype=h.dtype)).logabsdet for h in blocks
    )
    theta = [oracle.case.model.get_parameter(p).detach() for p in oracle.trainable]
    scatter = sum(t.square().sum() for t in theta)
    evidence = la.log_likelihood - (ratio + scatter) / 2
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence, rtol=1e-9, atol=1e-9)


@zoo_law
def test_the_prior_is_optimised(name):
    """The evidence grows to a point where it no longer changes with any precision."""
    la = fitted(oracle_of(name).case)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior(tolerance=1e-4)
    log_delta = la.prior_precision.log().detach().requires_grad_()
    after = la.log_marginal_likelihood(log_delta.exp())
    (slope,) = torch.autograd.grad(after, log_delta)
    assert after.item() > before
    assert slope.abs().max() < 1e-4  # nats per unit of log delta, as asked for


@zoo_law
def test_glm_covariance_is_dense(name):
    """J (H + delta)^-1 J^T block by block: J by autograd."""
    oracle, la = oracle_of(name), fitted(oracle_of(name).case)
    la.prior_precision = torch.linspace(0.5, 3, la.prior_precision.numel(), dtype=torch.float64)
    terms, x = oracle.seen.terms, oracle.seen.x
    want = 0
    for block, delta in zip(la.curvature.blocks.values(), la.prior_precision, strict=True):
        j = oracle.jacobian(block.params)  # (m, c, p)
        precision = block.dense() + delta * torch.eye(j.shape[-1], dtype=j.dtype)
        want = want + j @ torch.linalg.solve(precision, j.flatten(0, 1).T).T.view_as(j).mT
    predictive = la.predict(x)
    got = predictive.covariance_f.flatten(0, 1)  # (m, c, c)
    counted = terms.hessian.flatten(1).any(1)
    torch.testing.assert_close(got[counted], want[counted], rtol=1e-7, atol=oracle.case.tolerance)
    mean = predictive.mean_f.flatten(0, 1)
    torch.testing.assert_close(mean, terms.f.detach(), rtol=1e-12, atol=1e-12)


@zoo_law
def test_predictions_and_samples(name):
    """Shaped like the output, normalised, reproducible; the model is left as it was."""
    case, (x, y) = oracle_of(name).case, oracle_of(name).case.data
    output = case.forward(x).detach()
    photograph = Untouched(case.model)
    la = fitted(case)
    if case.likelihood == "classification":
        axis = -1 if output.shape[:-1] == y.shape else 1
        for pred_type in ("glm", "linear", "nn"):
            probs = la(x, pred_type=pred_type, n_samples=3)
            assert probs.shape == output.shape
            torch.testing.assert_close(probs.sum(axis), torch.ones(y.shape).double())
    else:
        mean, covariance = la(x)
        torch.testing.assert_close(mean, output)
        assert covariance.shape == (*output.shape, output.shape[-1])
        assert (torch.linalg.eigvalsh(covariance) > 0).all()
    draws = la.sample(2, generator=torch.Generator().manual_seed(1))
    again = la.sample(2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draws, again) and not torch.equal(draws[0], draws[1])
    assert draws.shape == (2, sum(p.numel() for p in case.model.parameters() if p.requires_grad))
    functions = la.functional_samples(x, 2)
    assert functions.shape == (2, *output.shape) and functions.isfinite().all()
    assert la.predictive_samples(x, 2).shape == functions.shape
    photograph.check()


def log_likelihood(oracle: Oracle) -> Tensor:
    """Sum of log p(y | f) at sigma = 1 by torch's losses, labels -100 left out."""
    f, y = oracle.seen.terms.f.detach(), oracle.seen.y
    if y.is_floating_point():
        loss = nn.functional.mse_loss(f, y, reduction="sum") / 2
        return -loss - 0.5 * y.numel() * math.log(2 * math.pi)
    return -nn.functional.cross_entropy(f, y.flatten(), reduction="sum")
