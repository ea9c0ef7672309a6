"""Where the evidence has no maximum: precisions and noise stop in time, and are named."""

from __future__ import annotations

import logging
import math

import oracles
import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner

METHODS = ("marglik", "mackay")
STRUCTURES = ("kron", "diag", "full")
REACH = 1e8


def rows(n: int = 40) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def labels(n: int = 40) -> Tensor:
    return torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(2))


def network(outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def zero_biases() -> nn.Sequential:
    model = network()
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.bias)
    return model


class Spare(nn.Module):
    """A network and parameters that it does not use, small or large."""

    def __init__(self, size: float = 3.0):
        super().__init__()
        self.net = network()
        self.spare = nn.Parameter(torch.full((20,), size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Dead(nn.Module):
    """Units that are off for all data: used, but without curvature."""

    def __init__(self):
        super().__init__()
        self.net, self.off = network(), nn.Linear(3, 5).double()
        self.head = nn.Linear(5, 3, bias=False).double()
        with torch.no_grad():
            self.off.bias.fill_(-6.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.head(self.off(x).relu())


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def precisions(la: Laplace) -> dict[str, float]:
    return dict(
        zip((g.name for g in la.curvature.groups), la.prior_precision.tolist(), strict=True)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [1.0, 0.01])
def test_parameters_at_their_prior_mean(start, method, structure, caplog):
    la = Laplace(
        zero_biases(), joint_bias=False, prior_precision=start, hessian_structure=structure
    ).fit([(rows(), labels())])
    la.optimize_prior(method)
    found = precisions(la)
    assert found["0.bias"] == found["2.bias"] == pytest.approx(REACH * start)
    assert 0.1 < found["0.weight"] < 100
    assert 0.1 < found["2.weight"] < 100
    (said,) = warned(caplog)
    assert "no maximum in the prior precision of 0.bias, 2.bias: its mode equals" in said
    assert float(la.sample(5).abs().max()) < 20
    before = la.log_marginal_likelihood()
    la.optimize_prior(method)  # there is nothing left to gain
    assert precisions(la)["0.bias"] == pytest.approx(REACH * start)
    torch.testing.assert_close(la.log_marginal_likelihood(), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_other_precisions_are_at_their_maximum(method, structure):
    """As if the zero biases were no parameters: their share of the evidence is gone at REACH."""
    data = [(rows(), labels())]
    la = Laplace(zero_biases(), joint_bias=False, hessian_structure=structure).fit(data)
    weights = Laplace(
        zero_biases(),
        joint_bias=False,
        hessian_structure=structure,
        subset_of_weights=["*.weight"],
    ).fit(data)
    for each in (la, weights):
        each.optimize_prior(method)
    both, alone = precisions(la), precisions(weights)
    for name in alone:
        assert both[name] == pytest.approx(alone[name], rel=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", [*METHODS, "gridsearch"])
@pytest.mark.parametrize("size", [1e-9, 3.0, 1e9])
def test_parameters_without_effect_keep_their_precision(size, method, structure):
    data = [(rows(), labels())]
    la = Laplace(Spare(size), prior_precision=0.7, hessian_structure=structure).fit(data)
    alone = Laplace(network(), prior_precision=0.7, hessian_structure=structure).fit(data)
    for each in (la, alone):
        each.optimize_prior(method, val_loader=data)
    found = precisions(la)
    assert found.pop("spare") == 0.7
    want = alone.prior_precision.tolist()
    assert list(found.values()) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_they_have_no_say_in_a_shared_precision(method, structure):
    """∫ p(D | θ) p(θ | δ) dθ does not depend on them: the optimum is that of the others."""
    data = [(rows(), labels())]
    found = []
    for model in (Spare(), network()):
        la = Laplace(model, prior_structure="scalar", hessian_structure=structure).fit(data)
        found.append(float(la.optimize_prior(method).prior_precision))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_curvature(method, structure, caplog):
    """Nothing is known of them but the user's prior: it stays, as for parameters without effect."""
    la = Laplace(Dead(), prior_precision=2.0, hessian_structure=structure)
    la.fit([(rows(), labels())]).optimize_prior(method)
    found = precisions(la)
    assert found["off.weight"] == found["head.weight"] == 2.0
    (said,) = warned(caplog)
    assert "of off.weight, head.weight: no data determine it" in said
    assert all(0.01 < delta < 100 for name, delta in found.items() if name.startswith("net"))
    la.optimize_prior(method)
    assert precisions(la)["off.weight"] == 2.0


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_no_data_show(method):
    """Under "diag" priors each entry of an embedding has a precision of its own."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(4, 3)).double()
    tokens = torch.arange(40)[:, None] % 4
    la = Laplace(model, hessian_structure="diag", prior_structure="diag", prior_precision=0.7)
    la.fit([(tokens, labels())]).optimize_prior(method)
    by_token = la.prior_precision[:24].reshape(6, 4)
    assert (by_token[4:] == 0.7).all() and (by_token[:4] != 0.7).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("sigma", [1.0, 1e-3])
def test_a_perfect_fit(sigma, structure, method, caplog):
    """Residuals of zero: −N log σ rises for ever, faster than the log-determinant falls."""
    model = nn.Linear(3, 1).double()
    x = rows()
    la = Laplace(model, "regression", hessian_structure=structure, sigma_noise=sigma)
    la.fit([(x, model(x).detach())]).optimize_prior(method)
    assert float(la.sigma_noise) == pytest.approx(sigma / REACH)
    (said,) = warned(caplog)
    assert "no maximum in sigma_noise: the residuals are nearly zero" in said
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    # γ = 4 of 4 directions: δ = γ/‖θ‖², as MacKay's fixed point has it
    assert float(la.prior_precision) == pytest.approx(4 / float(theta.square().sum()), rel=1e-4)
    assert torch.isfinite(la.sample(3)).all()
    mean, covariance = la(x)
    torch.testing.assert_close(mean, model(x).detach())
    assert torch.isfinite(covariance).all()


@pytest.mark.parametrize("method", METHODS)
def test_ordinary_searches_say_nothing(method, caplog):
    """Optima well beyond a factor of a million from the start are reached and are no news."""
    la = Laplace(network(), prior_precision=1e-7).fit([(rows(), labels())])
    near = Laplace(network()).fit([(rows(), labels())])
    for each in (la, near):
        each.optimize_prior(method)
    torch.testing.assert_close(
        la.log_marginal_likelihood(), near.log_marginal_likelihood(), rtol=0, atol=1e-2
    )
    assert not warned(caplog)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_at_its_prior_mean(method, structure, caplog):
    """All precisions at the end, so that the evidence is the likelihood."""
    model = network()
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    la = Laplace(model, prior_mean=theta, hessian_structure=structure).fit([(rows(), labels())])
    la.optimize_prior(method)
    assert la.prior_precision.tolist() == pytest.approx([REACH, REACH])
    losses = oracles.negative_log_likelihoods(model(rows()), labels(), "classification")
    assert float(la.log_marginal_likelihood()) == pytest.approx(-float(losses.sum().detach()))
    assert len(warned(caplog)) == 1


def test_users_objectives_see_all_precisions_but_those_without_effect(caplog):
    """A Gamma(2, 1) prior on each δ has a maximum where the evidence has none."""

    def with_hyperprior(posterior):
        delta = posterior.hyperparameters.prior_precision
        return posterior.log_marginal_likelihood + (2 * delta.log() - delta).sum()

    la = Laplace(zero_biases(), joint_bias=False).fit([(rows(), labels())])
    la.optimize_prior(objective=with_hyperprior)
    found = precisions(la)
    # γ/2 + 2 = δ, and γ < 2 of a bias of 4 or 3 entries
    assert 2 < found["0.bias"] < 4
    assert not warned(caplog)


@pytest.mark.parametrize("method", METHODS)
def test_the_tuner_stops_in_time_too(method, caplog):
    """Rounds without training in between, far more than it takes to reach 1e48 unbounded."""
    tuner = MarglikTuner(
        zero_biases(),
        "classification",
        40,
        joint_bias=False,
        method=method,
        n_hypersteps=40,
        lr_hyp=1.0,
        tune="all",
        prior_precision=1.0,
    )
    for _ in range(12):
        tuner.step([(rows(), labels())])
    delta = dict(
        zip(tuner.groups, tuner.hyperparameters()["prior_precision"].tolist(), strict=True)
    )
    assert delta["0.bias"] <= REACH * (1 + 1e-6)
    assert delta["2.bias"] <= REACH * (1 + 1e-6)
    assert 0.1 < delta["0.weight"] < 100
    if method == "mackay":
        assert len([text for text in warned(caplog) if "no maximum" in text]) == 1


@pytest.mark.parametrize("make", [Spare, Dead])
@pytest.mark.parametrize("method", METHODS)
def test_the_tuner_leaves_alone_what_data_do_not_determine(method, make, caplog):
    model = make()
    tuner = MarglikTuner(model, "classification", 40, method=method, prior_precision=2.0)
    for _ in range(4):
        tuner.step([(rows(), labels())])
    delta = dict(
        zip(tuner.groups, tuner.hyperparameters()["prior_precision"].tolist(), strict=True)
    )
    assert {delta[name] for name in delta if not name.startswith("net")} == {2.0}
    assert all(value != 2.0 for name, value in delta.items() if name.startswith("net"))
    assert len(warned(caplog)) == 1


def test_the_start_of_a_tuner_is_part_of_its_state():
    """A tuner that goes on has the range of the one that began."""
    data = [(rows(), labels())]

    def made(start: float) -> MarglikTuner:
        return MarglikTuner(
            zero_biases(),
            "classification",
            40,
            joint_bias=False,
            method="mackay",
            prior_precision=start,
        )

    first, later = made(1.0), made(1e-3)
    first.step(data)
    later.load_state_dict(first.state_dict())
    for tuner in (first, later):
        for _ in range(3):
            tuner.step(data)
    assert torch.equal(*(t.hyperparameters()["prior_precision"] for t in (first, later)))


def test_the_evidence_of_a_range_is_its_supremum():
    """Zero biases at REACH: the dense evidence with the biases left out, up to what is left."""
    data = (rows(), labels())
    la = Laplace(zero_biases(), joint_bias=False, hessian_structure="full").fit([data])
    la.optimize_prior()
    model, names = zero_biases(), ["0.weight", "2.weight"]
    hessian = oracles.ggn(model, *data, "classification", names)
    named = dict(model.named_parameters())
    found = precisions(la)
    delta = torch.cat([torch.full((named[n].numel(),), found[n]).double() for n in names])
    theta = torch.cat([named[n].detach().flatten() for n in names])
    losses = oracles.negative_log_likelihoods(model(data[0]), data[1], "classification")
    fit = -float(losses.detach().sum())
    ratio = float(oracles.log_det_ratio(hessian, 1.0, delta))
    want = fit - 0.5 * (ratio + float((delta * theta.square()).sum()))
    assert math.isclose(float(la.log_marginal_likelihood()), want, abs_tol=1e-5)
