"""laplace-torch's names and orders of arguments, against the dense Gaussian that they speak of."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import oracles
import pytest
import torch
from cases import build

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.migration.words import LaplaceTorchWords

STRUCTURES = ("kron", "diag", "full")


class Word(str, Enum):
    """As laplace-torch's enumerations are."""

    GLM = "glm"
    NN = "nn"
    PROBIT = "probit"


def fit(structure="kron", name="mlp-tanh", **options):
    """A posterior with a precision for each group, σ or T away from 1, and the dense P."""
    case = build(name)
    moved = {"sigma_noise": 0.6} if case.likelihood == "regression" else {"temperature": 0.7}
    la = Laplace(case.model, case.likelihood, hessian_structure=structure, **moved, **options)
    la.fit(case.batches)
    la.prior_precision = torch.linspace(0.5, 3, len(la.prior_precision), dtype=torch.float64)
    names = [name for name, _ in case.model.named_parameters()]
    sizes = {name: p.numel() for name, p in case.model.named_parameters()}
    starts = dict(zip(names, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    place = {name: torch.arange(starts[name], starts[name] + sizes[name]) for name in names}
    precision = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for block in la.curvature.blocks.values():
        where = torch.cat([place[name] for name in block.params])
        precision[where[:, None], where] = block.dense() / (0.36 if "sigma_noise" in moved else 0.7)
    delta = torch.empty(len(precision), dtype=torch.float64)
    for group, value in zip(la.curvature.groups, la.prior_precision, strict=True):
        delta[torch.cat([place[name] for name in group.layout.params])] = value
    return la, case, precision + delta.diag(), delta


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "cnn"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_gaussian_in_their_words(structure, name):
    """Density, norm, mean and prior are those of a multivariate normal with the dense precision."""
    la, case, precision, delta = fit(structure, name)
    mean = torch.cat([p.detach().flatten() for p in case.model.parameters()]).double()
    assert torch.equal(la.mean, mean) and la.n_params == len(mean)
    torch.testing.assert_close(la.prior_precision_diag, delta)
    value = mean + torch.linspace(-1, 1, len(mean), dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    torch.testing.assert_close(la.log_prob(value), normal.log_prob(value))
    away = value - mean
    torch.testing.assert_close(la.square_norm(value), away @ precision @ away)
    torch.testing.assert_close(la.log_prob(value, normalized=False), -0.5 * la.square_norm(value))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_posterior_precision(structure):
    la, _, precision, delta = fit(structure)
    if structure == "kron":
        for name in ("posterior_precision", "H"):
            with pytest.raises(UnsupportedUse, match=rf"^{name}: .*curvature.blocks\[name\]"):
                getattr(la, name)
        return
    found, curvature = la.posterior_precision, 0.7 * (precision - delta.diag())  # T = 0.7
    torch.testing.assert_close(found.diag() if structure == "diag" else found, precision)
    torch.testing.assert_close(la.H.diag() if structure == "diag" else la.H, curvature)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kappa", [1.0, 0.3])
def test_functional_variances(structure, kappa):
    """κ J P⁻¹ Jᵀ; for Jacobians of the model they are the covariance of predictions."""
    la, case, precision, _ = fit(structure)
    la.posterior_scale = kappa
    x = case.x[:4]
    names = [name for name, _ in case.model.named_parameters()]
    outputs = case.model(x)
    jacobian = oracles.parameter_jacobian(outputs.flatten(), case.model, names)
    expected = kappa * jacobian @ torch.linalg.solve(precision, jacobian.mT)
    rows = jacobian.unflatten(0, outputs.shape).detach()
    torch.testing.assert_close(la.functional_covariance(rows), expected.detach())
    own = expected.detach().reshape(4, 3, 4, 3)[range(4), :, range(4)]
    torch.testing.assert_close(la.functional_variance(rows), own)
    torch.testing.assert_close(la.predict(x).covariance, own)


def test_the_log_probability_has_a_gradient():
    la, _, precision, _ = fit()
    value = (la.mean + 0.3).requires_grad_()
    la.log_prob(value).backward()
    torch.testing.assert_close(value.grad, -precision @ (value.detach() - la.mean))


def test_the_number_of_outputs():
    assert fit()[0].n_outputs == 3
    case = build("mlp-regression")
    la = Laplace(case.model, "regression").fit(case.batches)
    assert la.n_outputs == case.model(case.x).shape[1]
    case = build("tokens")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    with pytest.raises(UnsupportedUse, match="n_outputs: outputs have more axes"):
        _ = la.n_outputs


def test_their_numbers_of_draws():
    """`n_samples` in place of n, and `pred_type` by position where they have it."""
    la, case, *_ = fit()

    def seeded():
        return torch.Generator().manual_seed(1)

    few = la.sample(n_samples=3, generator=seeded())
    assert torch.equal(few, la.sample(3, seeded()))
    assert la.sample().shape == (100, la.n_params)
    for draw in (la.functional_samples, la.predictive_samples):
        expected = draw(case.x, 3, pred_type="nn", generator=seeded())
        for found in (
            draw(case.x, pred_type="nn", n_samples=3, generator=seeded()),
            draw(case.x, Word.NN, 3, generator=seeded()),
            draw(case.x, "nn", n_samples=3, generator=seeded()),
        ):
            assert torch.equal(found, expected)
        assert draw(case.x, "glm").shape[0] == draw(case.x).shape[0] == 100
        with pytest.raises(InvalidType, match="n_samples: says the same as n. got 3 and n=4"):
            draw(case.x, 4, n_samples=3)
        with pytest.raises(InvalidType, match="pred_type: says the same .*got 'linear' and 'nn'"):
            draw(case.x, "nn", 3, pred_type="linear")
    for ask in (lambda: la.sample("nn"), lambda: la.sample(n_samples=2.5)):
        with pytest.raises(InvalidType, match="n_samples: not a whole number"):
            ask()


def test_their_order_of_joint_and_link():
    la, case, *_ = fit()
    expected = la(case.x, link_approx="probit")
    assert torch.equal(la(case.x, "glm", False, "probit"), expected)
    assert torch.equal(la(case.x, Word.GLM, False, Word.PROBIT), expected)
    assert torch.equal(la(case.x, "glm", False), la(case.x))
    la, case, *_ = fit(name="mlp-regression")
    for found in (la(case.x, "glm", True), la(case.x, "glm", True, "probit", 3)):
        for have, want in zip(found, la(case.x, joint=True), strict=True):
            assert torch.equal(have, want)
    with pytest.raises(InvalidType, match="joint: neither True nor False. got 'probit'"):
        la(case.x, "glm", "probit", "probit")


def test_what_is_no_vector_and_no_jacobian():
    la, case, *_ = fit()
    for value in (la.mean[:-1], 3.0):
        with pytest.raises(InvalidValue, match=f"value: .*a vector of {la.n_params}"):
            la.log_prob(value)
    for rows in (la.mean, case.x, torch.ones(2, 3, 4), None):
        with pytest.raises(InvalidType, match=f"Js: .*outputs, {la.n_params}"):
            la.functional_variance(rows)


def test_before_the_fit():
    la = Laplace(build("mlp-tanh").model)
    for name in ("mean", "n_params", "n_outputs", "posterior_precision", "prior_precision_diag"):
        with pytest.raises(NotFitted):
            getattr(la, name)


def test_every_word_is_in_the_page():
    """docs/coming-from-laplace-torch.md names what is here."""
    page = Path(__file__).parents[2] / "docs" / "coming-from-laplace-torch.md"
    text = page.read_text(encoding="utf-8")
    ours = {"posterior"}  # which the others are made of
    words = [n for n in vars(LaplaceTorchWords) if not n.startswith("_") and n not in ours]
    assert len(words) > 10
    assert [name for name in words if not re.search(rf"`(la\.)?{name}\b", text)] == []
