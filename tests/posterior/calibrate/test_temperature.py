"""κ and a temperature by held-out data: in `fit`, in `calibrate`, and again when δ moves."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from posterior import dense
from scipy.optimize import minimize_scalar
from torch import Tensor

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Bernoulli, Categorical
from kfac_laplace.posterior.calibrate.held_out import HeldOut
from kfac_laplace.posterior.calibrate.temperature import SHRINKAGE, Criterion, best_scaling

ONE = torch.ones((), dtype=torch.float64)


def points(n: int, sharpness: float, variance: float, seed: int = 0, c: int = 3) -> HeldOut:
    """Logits that are `sharpness` times those of the labels' own probabilities."""
    draw = torch.Generator().manual_seed(seed)
    f = 1.5 * torch.randn(n, 1, c, dtype=torch.float64, generator=draw)
    y = torch.multinomial(f[:, 0].softmax(-1), 1, generator=draw)
    a = torch.randn(n, 1, c, c, dtype=torch.float64, generator=draw)
    return HeldOut(sharpness * f, variance * a @ a.mT / c, y)


def plain_loss(held_out: HeldOut, tau: float) -> float:
    """−log softmax(f/τ)_y, on average, by torch."""
    f = held_out.mean[:, 0] / tau
    return float(torch.nn.functional.cross_entropy(f, held_out.target[:, 0]))


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("variance", [0.0, 0.1, 30.0])
def test_no_worse_than_temperature_alone_or_scale_alone(sharpness, variance):
    held_out = points(80, sharpness, variance)
    loss = Criterion(Categorical(), held_out, ONE, 0)
    kappa, tau = best_scaling(Categorical(), held_out, ONE, 0)
    best = loss(kappa, tau)

    def at(log_tau):
        return plain_loss(held_out, math.exp(log_tau)) + log_tau**2 / (2 * 80 * SHRINKAGE**2)

    found = minimize_scalar(at, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    slack = 2e-6  # a covariance that gains less is left out, and logarithms have four digits
    assert best <= found.fun + slack
    assert best <= min(loss(10.0**power, 1.0) for power in range(-9, 4)) + slack
    # τ = 1 costs nothing, so that κ alone is no better on the bare likelihood either
    bare = best - (math.log(tau) / SHRINKAGE) ** 2 / (2 * 80)
    assert bare <= min(loss(10.0 ** (power / 2), 1.0) for power in range(-18, 7)) + slack


def test_many_points_say_what_the_temperature_is():
    _, tau = best_scaling(Categorical(), points(4000, 3.0, 0.0), ONE, 0)
    assert tau == pytest.approx(3.0, rel=0.1)


def test_few_points_without_an_error_do_not_drive_it_to_zero():
    held_out = points(60, 4.0, 0.1)
    right = HeldOut(held_out.mean, held_out.covariance, held_out.mean.argmax(-1))
    _, tau = best_scaling(Categorical(), right, ONE, 0)
    assert 0.2 < tau < 1
    assert plain_loss(right, 0.01) < plain_loss(right, tau)  # as the likelihood alone would have it


def test_binary_points():
    held_out = points(500, 3.0, 0.0, c=1)
    draw = torch.Generator().manual_seed(1)
    y = torch.bernoulli((held_out.mean / 3).sigmoid(), generator=draw)
    kappa, tau = best_scaling(Bernoulli(), HeldOut(held_out.mean, held_out.covariance, y), ONE, 0)
    assert kappa == 0 and tau == pytest.approx(3.0, rel=0.3)


# --- through the facade ------------------------------------------------------------------------


def data(case, n: int = 40) -> tuple[Tensor, Tensor]:
    """Held-out inputs with labels that the network gets right three times in four."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, dtype=torch.float64, generator=draw)
    y = case.model(x).detach().argmax(1)
    y[::4] = (y[::4] + 1) % 3
    return x, y


def scaling(la):
    return float(la.posterior_scale), float(la.predictive_temperature)


def test_fit_takes_held_out_data():
    la, case = dense.fit("mlp-tanh")
    held_out = [data(case)]
    by_fit = Laplace(case.model).fit(case.batches, held_out)
    assert scaling(by_fit) == scaling(la.calibrate(held_out, "validation"))
    assert scaling(by_fit) == scaling(Laplace(case.model).fit(case.batches).calibrate(held_out))
    assert scaling(by_fit) == scaling(la.fit(case.batches, val_loader=held_out))
    assert float(by_fit.predictive_temperature) != 1


def test_a_generator_of_held_out_data_is_kept():
    la, case = dense.fit("mlp-tanh")
    kept = Laplace(case.model).fit(case.batches, iter([data(case)])).optimize_prior()
    again = Laplace(case.model).fit(case.batches).optimize_prior().calibrate([data(case)])
    assert scaling(kept) == scaling(again)


@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_they_choose_anew_when_the_evidence_has_moved_the_precisions(method):
    _, case = dense.fit("mlp-regression")
    held_out = [(case.x + 1, case.y + 0.5)]
    la = Laplace(case.model, "regression").fit(case.batches, held_out)
    before = scaling(la)
    la.optimize_prior(method)
    assert scaling(la) != before
    assert scaling(la) == scaling(la.calibrate(held_out))


def test_scales_that_are_given_stay_when_the_precisions_move():
    la, _ = dense.fit("mlp-tanh")
    la.posterior_scale, la.predictive_temperature = 0.3, 1.7
    la.optimize_prior()
    assert scaling(la) == (0.3, 1.7)


@pytest.mark.parametrize("held_out", [3, [], [(torch.zeros(2, 4).double(), torch.tensor([0, 9]))]])
def test_wrong_held_out_data_leave_everything_as_it_was(held_out):
    la, case = dense.fit("mlp-tanh")
    before = la.log_marginal_likelihood().detach(), scaling(la), la.n_data
    with pytest.raises((InvalidValue, InvalidType)):
        la.fit(case.batches[:1], held_out)
    after = la.log_marginal_likelihood().detach(), scaling(la), la.n_data
    assert after == before


def test_regression_has_no_temperature():
    la, case = dense.fit("mlp-regression")
    la.fit(case.batches, [(case.x, case.y)])
    assert float(la.predictive_temperature) == 1
    with pytest.raises(InvalidValue, match="predictive_temperature"):
        la.predictive_temperature = 2.0
    la.predictive_temperature = 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_are_positive(value):
    la, _ = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="predictive_temperature"):
        la.predictive_temperature = value
    assert float(la.predictive_temperature) == 1


# --- which data they are -----------------------------------------------------------------------


def test_without_a_method_the_training_data_are_left_out_one_by_one():
    """By identity, and by content where another loader yields them."""
    la, case = dense.fit("mlp-regression")
    want = float(la.calibrate(method="loo").posterior_scale)
    for loader in (None, case.batches, [(case.x, case.y)]):
        la.posterior_scale = 1.0
        assert float(la.calibrate(loader).posterior_scale) == pytest.approx(want, rel=1e-6)


def test_without_a_method_other_data_are_held_out():
    la, case = dense.fit("mlp-regression")
    x, y = case.x + 1, case.y + 0.5
    got = float(la.calibrate([(x, y)]).posterior_scale)
    assert got == float(la.calibrate([(x, y)], "validation").posterior_scale)


def test_the_same_targets_with_other_inputs_are_said(caplog):
    la, case = dense.fit("mlp-regression")
    la.calibrate([(case.x + 1, case.y)])
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "held-out data" in said and "method='loo'" in said


# --- files -------------------------------------------------------------------------------------


def test_files_hold_them(tmp_path):
    la, case = dense.fit("mlp-tanh")
    la.calibrate([data(case)])
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", case.model)
    assert scaling(again) == scaling(la)
    assert torch.equal(again(case.x), la(case.x))
    with pytest.raises(InvalidValue, match="predictive_temperature"):
        Laplace.load(tmp_path / "la.pt", case.model, predictive_temperature=1.0)


@pytest.mark.parametrize(("kappa", "link"), [(1.0, "mode"), (0.4, "probit")])
def test_older_files_have_none(kappa, link):
    """Their κ, where one was chosen, was chosen by the probit link."""
    from kfac_laplace.states.plain import CHECKSUM, sealed

    la, case = dense.fit("mlp-tanh")
    la.posterior_scale = kappa
    newer = ("predictive_temperature", "scale_source", CHECKSUM)
    older = sealed({k: v for k, v in la.state_dict().items() if k not in newer})
    other = Laplace(case.model).fit(case.batches)
    other.load_state_dict(older)
    assert scaling(other) == (kappa, 1.0)
    torch.testing.assert_close(other(case.x), la(case.x, link_approx=link))


@pytest.mark.parametrize(
    "change",
    [
        {"predictive_temperature": torch.tensor(0.0)},
        {"predictive_temperature": 1.0},
        {"scale_source": "somewhere"},
    ],
)
def test_damaged_ones_are_refused(change):
    from kfac_laplace.states.plain import CHECKSUM, sealed

    la, _ = dense.fit("mlp-tanh")
    state = {k: v for k, v in la.state_dict().items() if k != CHECKSUM}
    with pytest.raises(InvalidValue, match=next(iter(change))):
        la.load_state_dict(sealed({**state, **change}))
