"""Experts that some rounds use and others do not: groups differ, precisions go on by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training


class Late(nn.Module):
    """The expert `e` is used where some example goes beyond 1.2."""

    def __init__(self):
        super().__init__()
        self.a, self.e, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.a(x).tanh()
        far = x[:, :1] > 1.2
        if bool(far.any()):
            h = torch.where(far, self.e(h).tanh(), h)
        return self.c(h)


def made():
    torch.manual_seed(0)
    model = Late().double()
    x = torch.randn(8, 3).double()
    x[:4, 0] = 0.5
    x[4:, 0] = 2.0
    y = torch.arange(8) % 2
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    return model, batches


def deltas(prior, precision):
    """δ of each parameter."""
    groups = prior.by_group(precision)
    return {
        param: groups[name].flatten()[0].item()
        for name, layout in prior.layouts.groups.items()
        for param in layout.params
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_rounds_in_either_order(structure, method):
    model, o = made()
    tuner = MarglikTuner(model, "classification", 8, hessian_structure=structure, method=method)
    for order in (o, o[::-1], o, o[:1], o):
        before = tuner.laplace(order)
        record = tuner.step(order)
        same = Laplace(model, hessian_structure=structure).fit(order)
        same.log_marginal_likelihood(**record.hyperparameters)
        expected = same.posterior.apart_from_unused.log_marginal_likelihood
        assert record.evidence == pytest.approx(float(expected), rel=1e-9)
        assert set(before.prior_precision.shape) == set(same.prior_precision.shape)
        tuner.loss(model(o[1][0]), o[1][1]).backward()


def test_precisions_go_on_by_name():
    model, o = made()
    tuner = MarglikTuner(model, "classification", 8)
    tuner.step(o[::-1])
    first = tuner.laplace(o[::-1])
    have = deltas(first.posterior.prior, first.prior_precision)
    assert len(set(have.values())) == 3
    then = tuner.laplace(o)
    assert [*then.posterior.prior.layouts.groups] != [*first.posterior.prior.layouts.groups]
    assert deltas(then.posterior.prior, then.prior_precision) == have


@pytest.mark.parametrize("sharing", ["scalar", "layerwise", "diag"])
def test_laplace_fits_again_in_the_other_order(sharing):
    model, o = made()
    la = Laplace(model, hessian_structure="diag", prior_structure=sharing).fit(o)
    la.fit(o[::-1])
    assert set(la.prior_precision.tolist()) == {1.0}
    la.optimize_prior(n_steps=2)
    la.fit(o)


def test_a_whole_training():
    model, o = made()

    class Turning:
        def __init__(self):
            self.turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(o if self.turn % 2 else o[::-1])

    marglik_training(model, Turning(), n_epochs=2)
