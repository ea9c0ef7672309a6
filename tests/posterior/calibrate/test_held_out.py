"""Held-out losses: ignored targets are left out, weights count, smoothing does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import build

from kfac_laplace import Bernoulli, Categorical, Laplace
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.links import probit
from kfac_laplace.posterior.calibrate.held_out import HeldOut, negative_log_likelihood
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points

ONE = torch.ones((), dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)


def held_out(y):
    """Outputs (n, t, c) with covariances, beside the targets."""
    draw = torch.Generator().manual_seed(0)
    n, t = y.shape[:2]
    mean = torch.randn(n, t, 3, dtype=torch.float64, generator=draw)
    root = torch.randn(n, t, 3, 3, dtype=torch.float64, generator=draw)
    return HeldOut(mean, root @ root.mT, y)


def labels(ignore_index=-100):
    y = torch.tensor([[0, 1], [2, 0], [1, 1], [2, 0]])
    return y.where(torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]]).bool(), ignore_index)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_categorical_loss_is_torchs_on_the_predictive(weight, ignore_index, smoothing):
    y = labels(ignore_index)
    points = held_out(y)
    likelihood = Categorical(ignore_index=ignore_index, weight=weight, label_smoothing=smoothing)
    got = negative_log_likelihood(likelihood, points, ONE, 0.6)
    log_probs = probit(points.mean, 0.6 * points.covariance).log_softmax(-1)
    want = F.nll_loss(
        log_probs.flatten(0, 1), y.flatten(), weight, ignore_index=ignore_index, reduction="sum"
    )
    assert got == pytest.approx(float(want) / 4, rel=1e-12)


@pytest.mark.parametrize("weight", [2.5, WEIGHT], ids=["one", "by output"])
def test_binary_loss_is_torchs_on_the_predictive(weight):
    y = torch.rand(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = held_out(y)
    likelihood = Bernoulli(pos_weight=weight)
    got = negative_log_likelihood(likelihood, points, ONE, 0.6)
    p = probit(points.mean, 0.6 * points.covariance).sigmoid()
    want = -(torch.as_tensor(weight) * y * p.log() + (1 - y) * (1 - p).log()).sum() / 4
    assert got == pytest.approx(float(want), rel=1e-12)


def with_ignored(case):
    """The data of a case with as many examples that are ignored, and others, among them."""
    draw = torch.Generator().manual_seed(2)
    x = torch.cat([case.x, 3 * torch.randn(7, 4, dtype=torch.float64, generator=draw)])
    return x, torch.cat([case.y, torch.full((7,), -100)]), torch.cat([case.y, case.y])


def scale(la, *batch):
    return float(la.calibrate([batch], method="validation").posterior_scale)


def overconfident(case):
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(4)
    return Laplace(case.model, hessian_structure="full")


def test_validation_data_that_are_ignored_move_neither_scale_nor_prior():
    case = build("mlp-tanh")
    la = overconfident(case).fit(case.batches)
    x, y, labelled = with_ignored(case)
    want = scale(la, case.x, case.y)
    # the search over log kappa stops within 1e-4
    assert scale(la, x, y) == pytest.approx(want, rel=1e-3)
    assert scale(la, x, labelled) != pytest.approx(want, rel=1e-1)
    grid = torch.logspace(-3, 3, 13).tolist()
    chosen = []
    for batch in ((case.x, case.y), (x, y), (x, labelled)):
        la.optimize_prior("gridsearch", val_loader=[batch], grid=grid)
        chosen.append(float(la.prior_precision[0]))
    assert chosen[0] == chosen[1] != chosen[2]


def test_leave_one_out_of_the_others_does_not_see_training_data_that_are_ignored():
    case = build("mlp-tanh")
    x, y, labelled = with_ignored(case)
    losses, means = [], []
    for batch in ((case.x, case.y), (x, y), (x, labelled)):
        la = overconfident(build("mlp-tanh")).fit([batch])
        points = leave_one_out_points(la.posterior, [batch], "labels", seed=0)
        losses.append(len(batch[0]) * negative_log_likelihood(la.likelihood, points, ONE, 0.3))
        means.append(points.mean[:7])
    torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)


def test_data_without_a_label_that_counts_are_refused():
    case = build("tokens")
    la = Laplace(case.model).fit(case.batches)
    nothing = [(case.x, torch.full_like(case.y, -100))]
    with pytest.raises(InvalidValue, match="target: no target counts"):
        la.calibrate(nothing, method="validation")
    with pytest.raises(InvalidValue, match="target: no target counts"):
        la.optimize_prior("gridsearch", val_loader=nothing)
    assert float(la.posterior_scale) == 1 and (la.prior_precision == 1).all()
