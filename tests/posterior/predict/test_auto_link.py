"""link_approx="auto": the mode until something sets the scale, then averages at that scale."""

import logging

import pytest
import torch
from posterior import dense

from kfac_laplace import Laplace
from kfac_laplace.likelihoods.links import averaged


def told(caplog):
    return [r for r in caplog.records if "link_approx='auto'" in r.getMessage()]


@pytest.mark.parametrize(("name", "activation"), [("mlp-tanh", "softmax"), ("mlp-binary", "sig")])
def test_without_a_scale_it_is_the_network_and_says_so_once(name, activation, caplog):
    la, case = dense.fit(name)
    with caplog.at_level(logging.INFO, logger="kfac_laplace"):
        f = case.model(case.x).detach()
        want = f.softmax(-1) if activation == "softmax" else f.sigmoid()
        torch.testing.assert_close(la(case.x), want)
        torch.testing.assert_close(la.predict(case.x).probs, la(case.x, link_approx="mode"))
        la.optimize_prior()
        la(case.x)
    (record,) = told(caplog)
    assert record.levelno == logging.INFO
    assert "val_loader" in record.getMessage() and "centred" in record.getMessage()


class Counted(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


def test_probabilities_of_the_network_cost_no_backward_pass():
    """A covariance takes one for each output."""

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.second(Counted.apply(self.first(x)))

    model, x = Counting(), torch.randn(6, 3)
    la = Laplace(model, "classification").fit([(x, torch.tensor([0, 1, 2, 0, 1, 2]))])
    Counted.passes = 0
    torch.testing.assert_close(la(x), model(x).softmax(-1))
    assert Counted.passes == 0
    la(x, link_approx="probit")
    assert Counted.passes == 3


def test_the_covariance_stays_that_of_the_posterior():
    la, case = dense.fit("mlp-tanh")
    by_mode, by_probit = la.predict(case.x), la.predict(case.x, link_approx="probit")
    assert torch.equal(by_mode.covariance, by_probit.covariance)
    assert torch.equal(by_mode.epistemic, by_probit.epistemic) and (by_mode.epistemic > 0).all()


def test_links_that_are_named_say_nothing(caplog):
    la, case = dense.fit("mlp-tanh")
    with caplog.at_level(logging.INFO, logger="kfac_laplace"):
        for link in ("mode", "probit", "centred", "bridge", "mc"):
            la(case.x, link_approx=link)
        la(case.x, pred_type="linear")
    assert not told(caplog)


def test_regression_has_no_link(caplog):
    la, case = dense.fit("mlp-regression")
    with caplog.at_level(logging.INFO, logger="kfac_laplace"):
        mean, covariance = la(case.x)
    assert (covariance.diagonal(dim1=1, dim2=2) > 0).all() and not told(caplog)


@pytest.mark.parametrize("kappa", [0.01, 1.0, 50.0])
def test_a_scale_that_is_given_takes_averages(kappa, caplog):
    la, case = dense.fit("mlp-tanh")
    la.posterior_scale = kappa
    with caplog.at_level(logging.INFO, logger="kfac_laplace"):
        predictive = la.predict(case.x)
    mean, covariance = predictive.mean_f[:, 0], predictive.covariance
    torch.testing.assert_close(predictive.probs, averaged(mean, covariance, 100, la.seed))
    assert not told(caplog)


def test_leave_one_out_keeps_the_link_that_it_chose_by():
    la, case = dense.fit("mlp-tanh")
    la.fit([(case.x, case.model(case.x).argmax(1))])
    la.calibrate()
    if float(la.posterior_scale) != 1:
        torch.testing.assert_close(la(case.x), la(case.x, link_approx="probit"))


def test_batches_and_single_inputs_get_the_same_answers():
    la, case = dense.fit("mlp-tanh")
    la.posterior_scale = 100.0
    alone = torch.cat([la(x[None]) for x in case.x])
    torch.testing.assert_close(la(case.x), alone, rtol=1e-9, atol=1e-12)


def test_points_follow_the_seed_or_the_generator():
    la, case = dense.fit("mlp-tanh")
    la.posterior_scale = 100.0

    def by(seed):
        return la(case.x, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(la(case.x), la(case.x)) and torch.equal(by(1), by(1))
    assert not torch.equal(by(1), by(2))
    other = Laplace(case.model, seed=5).fit(case.batches)
    other.posterior_scale = 100.0
    assert not torch.equal(other(case.x), la(case.x))


def test_a_temperature_alone_is_temperature_scaling():
    la, case = dense.fit("mlp-tanh")
    la.predictive_temperature = 2.0
    f = case.model(case.x).detach()
    torch.testing.assert_close(la(case.x), (f / 2).softmax(-1))
    torch.testing.assert_close(la.predict(case.x).mean_f[:, 0], f / 2)


def test_a_temperature_divides_functions_and_their_covariance():
    la, case = dense.fit("mlp-tanh")

    def functions():
        return la.functional_samples(case.x, 3, generator=torch.Generator().manual_seed(0))

    before, covariance = functions(), la.predict(case.x).covariance
    evidence = float(la.log_marginal_likelihood())
    la.predictive_temperature = 2.0
    torch.testing.assert_close(functions(), before / 2)
    torch.testing.assert_close(la.predict(case.x).covariance, covariance / 4)
    assert float(la.log_marginal_likelihood()) == evidence
