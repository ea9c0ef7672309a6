"""Links, the `Predictive` object, and the promise that predicting leaves the model alone."""

import math

import pytest
import torch
from cases import build
from laws import Untouched
from posterior import dense

from kfac_laplace import Laplace

STRUCTURES = ("kron", "diag", "full", "lowrank")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def function_moments(la, x):
    predictive = la.predict(x)
    return predictive.mean_f[:, 0], predictive.covariance


@pytest.mark.parametrize("structure", STRUCTURES)
def test_probit_link_is_mackays_scaling_of_the_logits(structure):
    """softmax(f / sqrt(1 + pi/8 var)), by the diagonal of the covariance."""
    la, case = dense.fit("mlp-tanh", hessian_structure=structure)
    f = case.model(case.x).detach()
    j = dense.jacobian(la, case)
    covariance = j @ torch.linalg.solve(dense.precision(la, case.model), j.mT)
    variance = covariance.diagonal(dim1=1, dim2=2)
    expected = (f / (1 + math.pi / 8 * variance).sqrt()).softmax(-1)
    torch.testing.assert_close(la(case.x, link_approx="probit"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("pred_type", ["glm", "linear"])
def test_monte_carlo_link_converges_to_the_integral(structure, pred_type):
    """Against an independent sampler of N(f, J Sigma Jᵀ), full class covariance."""
    la, case = dense.fit("mlp-tanh", hessian_structure=structure)
    x, n = case.x[:3], 40_000 if pred_type == "glm" else 2_000
    j = dense.jacobian(la, case)[:3]
    covariance = j @ torch.linalg.solve(dense.precision(la, case.model), j.mT)
    noise = torch.randn(n, 3, 3, dtype=torch.float64, generator=generator(7))
    samples = case.model(x).detach() + torch.einsum(
        "nij,snj->sni", torch.linalg.cholesky(covariance), noise
    )
    probs = samples.softmax(-1)
    got = la(x, pred_type=pred_type, link_approx="mc", n_samples=n, generator=generator())
    error = probs.std(0) * math.sqrt(2 / n)  # two independent estimates
    assert ((got - probs.mean(0)).abs() <= 5 * error).all()
    if pred_type == "glm":  # and the samples are enough to tell it from the probit link
        assert (la(x, link_approx="probit") - probs.mean(0)).abs().max() > 5 * error.max()


def test_bridge_link_is_the_laplace_bridge():
    """Dirichlet means with alpha_c = (1/S_cc)(1 - 2/C + exp(f_c)/C^2 sum_k exp(-f_k)).

    f and S are first corrected to sum to zero over the classes (softmax ignores their sum), as in
    Hobbhahn, Kristiadi & Hennig 2022.
    """
    la, case = dense.fit("mlp-tanh")
    f, covariance = function_moments(la, case.x)
    c = f.shape[-1]
    total = covariance.sum((1, 2))
    row = covariance.sum(-1)
    f = f - row * f.sum(-1, keepdim=True) / total[:, None]
    covariance = covariance - row[:, :, None] * row[:, None] / total[:, None, None]
    variance = covariance.diagonal(dim1=1, dim2=2)
    alpha = (1 - 2 / c + f.exp() / c**2 * (-f).exp().sum(-1, keepdim=True)) / variance
    got = la(case.x, link_approx="bridge")
    torch.testing.assert_close(got, alpha / alpha.sum(-1, keepdim=True))


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_a_certain_posterior_gives_the_modes_probabilities(link):
    """delta -> infinity: the covariance, of order 1e-9, vanishes and leaves softmax at the mode."""
    la, case = dense.fit("mlp-tanh", prior_precision=1e9)
    expected = case.model(case.x).detach().softmax(-1)
    got = la(case.x, link_approx=link, generator=generator())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pred_type", ["glm", "linear", "nn"])
@pytest.mark.parametrize("link", ["probit", "bridge", "mc"])
def test_probabilities_are_probabilities(pred_type, link):
    la, case = dense.fit("mlp-tanh")
    if pred_type != "glm" and link != "mc":
        link = "mc"
    probs = la(case.x, pred_type=pred_type, link_approx=link, n_samples=20)
    assert probs.shape == (7, 3) and (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(7, dtype=torch.float64))


def test_binary_probit_link():
    """One logit: sigmoid(f / sqrt(1 + pi/8 var)), and the Monte-Carlo link close to it."""
    la, case = dense.fit("mlp-binary")
    f, covariance = function_moments(la, case.x)
    expected = (f / (1 + math.pi / 8 * covariance[..., 0]).sqrt()).sigmoid()
    got = la(case.x, link_approx="probit")
    assert got.numel() == 7
    torch.testing.assert_close(got.flatten(), expected.flatten())
    drawn = la(case.x, link_approx="mc", n_samples=20_000, generator=generator())
    # MacKay's approximation is within 0.02 of the logistic-normal integral
    torch.testing.assert_close(drawn.flatten(), expected.flatten(), rtol=0, atol=0.03)


def test_predict_classification():
    la, case = dense.fit("mlp-tanh")
    predictive = la.predict(case.x)
    torch.testing.assert_close(predictive.probs, la(case.x))
    torch.testing.assert_close(predictive.mean, predictive.probs)  # E[y], one-hot
    torch.testing.assert_close(predictive.mean_f[:, 0], case.model(case.x).detach())
    assert predictive.covariance.shape == (7, 3, 3)
    p = predictive.probs
    torch.testing.assert_close(predictive.entropy, -(p * p.log()).sum(-1))
    distribution = predictive.distribution()
    assert isinstance(distribution, torch.distributions.Categorical)
    torch.testing.assert_close(distribution.probs, p)


def test_predict_regression_distribution_includes_the_noise():
    la, case = dense.fit("mlp-regression", sigma_noise=0.7)
    predictive = la.predict(case.x)
    mean, covariance = la(case.x)
    torch.testing.assert_close(predictive.mean, mean)
    torch.testing.assert_close(predictive.covariance, covariance)
    noisy = covariance + 0.7**2 * torch.eye(2)
    expected = torch.distributions.MultivariateNormal(mean, noisy)
    y = case.y
    distribution = predictive.distribution()
    torch.testing.assert_close(distribution.log_prob(y), expected.log_prob(y))
    torch.testing.assert_close(distribution.variance, expected.variance)
    torch.testing.assert_close(predictive.entropy, expected.entropy())


def test_predict_binary_distribution():
    la, case = dense.fit("mlp-binary")
    probs = la(case.x)
    distribution = la.predict(case.x).distribution()
    torch.testing.assert_close(distribution.mean.flatten(), probs.flatten())
    expected = torch.distributions.Bernoulli(probs).log_prob(case.y)
    torch.testing.assert_close(distribution.log_prob(case.y).flatten(), expected.flatten())


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "tokens"])
@pytest.mark.parametrize("delta", [1e-3, 1.0, 1e6])
def test_mutual_information_is_between_zero_and_the_entropy(name, delta):
    la, case = dense.fit(name, prior_precision=delta)
    predictive = la.predict(case.x)
    epistemic, entropy = predictive.epistemic, predictive.entropy
    assert epistemic.shape == entropy.shape
    assert (epistemic >= 0).all()
    if name != "mlp-regression":  # a differential entropy may be negative
        assert (epistemic <= entropy + 1e-12).all()
    if delta == 1e6:
        assert (epistemic < 1e-3).all()  # nothing left to learn about the weights


def test_mutual_information_regression_is_half_a_log_det_ratio():
    """I(y; theta) = 1/2 log det(S + sigma^2 I) - C/2 log sigma^2."""
    la, case = dense.fit("mlp-regression", sigma_noise=0.7)
    covariance = la.predict(case.x).covariance
    expected = 0.5 * torch.logdet(covariance / 0.7**2 + torch.eye(2))
    torch.testing.assert_close(la.predict(case.x).epistemic, expected)


PREDICTIONS = {
    "glm": {},
    "mc": {"link_approx": "mc"},
    "linear": {"pred_type": "linear", "n_samples": 3},
    "nn": {"pred_type": "nn", "n_samples": 3},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", PREDICTIONS.values(), ids=PREDICTIONS.keys())
@pytest.mark.parametrize("structure", STRUCTURES)
def test_fitting_and_predicting_leave_the_model_as_found(options, structure, training):
    case = build("vit")
    case.model.train(training)
    case.model.head.eval()  # a mixed mode survives too
    case.model.head.weight.grad = torch.ones_like(case.model.head.weight)
    photo = Untouched(case.model)
    la = Laplace(case.model, "classification", hessian_structure=structure).fit(case.batches)
    la.optimize_prior()
    la(case.x, **options)
    la.sample(2)
    photo.check()


@pytest.mark.parametrize("options", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_an_exception_while_predicting_leaves_the_model_as_found(options):
    """A peer leaves sampled weights in the model."""
    la, case = dense.fit("mlp-tanh")
    photo = Untouched(case.model)
    broken = torch.zeros(3, 99, dtype=torch.float64)  # the first layer takes 4 columns
    with pytest.raises((RuntimeError, ValueError)):
        la(broken, **options)
    photo.check()


@pytest.mark.parametrize("pred_type", ["linear", "nn"])
def test_an_exception_in_the_midst_of_sampling_leaves_the_model_as_found(pred_type):
    """The forward pass fails at the third sample, after two have been drawn."""
    case = build("mlp-tanh")

    class Fragile(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls, self.limit = net, 0, math.inf

        def forward(self, x):
            self.calls += 1
            if self.calls > self.limit:
                raise ArithmeticError("the third forward pass")
            return self.net(x)

    model = Fragile(case.model)
    la = Laplace(model, "classification").fit(case.batches)
    model.calls, model.limit = 0, 2 if pred_type == "nn" else 0
    photo = Untouched(case.model)
    with pytest.raises(ArithmeticError):
        la(case.x, pred_type=pred_type, n_samples=5)
    photo.check()
