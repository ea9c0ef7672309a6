"""Epistemic and aleatoric parts, and the score of strange inputs."""

import math

import pytest
import torch
from posterior import dense

from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.links import centred, probit

STRUCTURES = ("kron", "diag", "full")


def by_the_head(la, case):
    """J P⁻¹[head, head] Jᵀ by dense algebra."""
    j, precision = dense.jacobian(la, case), dense.precision(la, case.model)
    covariance = torch.linalg.inv(precision)
    head = torch.cat([
        torch.full((p.numel(),), float(name.startswith("2")))
        for name, p in case.model.named_parameters()
    ]).double()  # fmt: skip
    return (j * head) @ covariance @ (j * head).mT


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_score_is_the_entropy_by_the_covariance_of_the_last_layer(structure):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure)
    f = case.model(case.x).detach()
    p = centred(f, by_the_head(la, case)).softmax(-1)
    want = torch.special.entr(p).sum(-1)
    torch.testing.assert_close(la.predict(case.x).ood_score, want)
    la.posterior_scale, la.predictive_temperature = 0.1, 3.0
    torch.testing.assert_close(la.predict(case.x).ood_score, want)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_of_one_logit_by_the_probit(structure):
    la, case = dense.fit("mlp-binary", hessian_structure=structure)
    f = case.model(case.x).detach().reshape(-1, 1)
    p = probit(f, by_the_head(la, case)).sigmoid()
    want = (torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1)
    torch.testing.assert_close(la.predict(case.x).ood_score, want)


def test_of_values_the_variance_in_units_of_the_noise():
    la, case = dense.fit("mlp-regression", sigma_noise=0.5)
    predictive = la.predict(case.x)
    want = predictive.covariance.diagonal(dim1=1, dim2=2).sum(1) / 0.25
    torch.testing.assert_close(predictive.ood_score, want)
    constant = 0.5 * 2 * math.log(2 * math.pi * math.e * 0.25)
    torch.testing.assert_close(predictive.aleatoric, torch.full((7,), constant).double())
    torch.testing.assert_close(predictive.aleatoric + predictive.epistemic, predictive.entropy)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-binary"])
def test_the_parts_add_up_to_the_entropy_of_averages_over_the_same_draws(name):
    la, case = dense.fit(name)
    predictive = la.predict(case.x, link_approx="mc")
    torch.testing.assert_close(predictive.aleatoric + predictive.epistemic, predictive.entropy)


def test_strange_inputs_score_higher():
    la, case = dense.fit("mlp-regression")
    assert la.predict(20 * case.x).ood_score.mean() > 2 * la.predict(case.x).ood_score.mean()


def test_samples_have_no_score():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="ood_score"):
        _ = la.predict(case.x, "nn", n_samples=3).ood_score
    assert la.predict(case.x, "nn", n_samples=3).aleatoric.shape == (7,)


@pytest.mark.parametrize("name", ["vit", "cnn", "tokens"])
def test_every_network_has_one(name):
    la, case = dense.fit(name)
    score = la.predict(case.x).ood_score
    assert score.shape == (len(case.x),) and (score > 0).all()
