"""The tuner's loss under loss options is torch's own, and its rounds see the same."""

from __future__ import annotations

import pytest
import torch
from likelihoods.losses import WEIGHT, each, example, fit, loss

from kfac_laplace import Categorical, MarglikTuner


@each
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_tuners_loss_is_torchs_loss_and_the_prior(name, likelihood, temperature):
    case = example(name, likelihood)
    tuner = MarglikTuner(case.model, likelihood, 7, temperature=temperature, prior_precision=2.5)
    params = list(case.model.parameters())
    x, y = case.batches[1]
    got = tuner.loss(case.model(x), y)
    want = loss(likelihood, case.model(x), y) / (len(x) * temperature)
    want = want + 2.5 * sum(p.square().sum() for p in params) / (2 * 7)
    torch.testing.assert_close(got, want)
    gradients = zip(
        torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True
    )
    for g, w in gradients:
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_rounds_of_tuning_see_the_loss(method):
    """The record's evidence is that of a fit under the same loss."""
    case = example("tokens", Categorical(weight=WEIGHT, label_smoothing=0.3))
    tuner = MarglikTuner(case.model, case.likelihood, 7, method=method, prior_precision=1.0)
    record = tuner.step(case.batches)
    la = tuner.laplace(case.batches)
    assert record.evidence == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-9)
    before = float(fit(case).log_marginal_likelihood())
    assert record.evidence > before
