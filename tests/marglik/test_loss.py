"""The training loss is the negative log joint over n_data, with the posterior's own scaling."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import build
from posterior import dense

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.errors import InvalidValue

NAMES = ("mlp-tanh", "mlp-regression", "mlp-binary", "tokens", "tokens-regression", "vit")


def tuner_of(case, **options):
    return MarglikTuner(case.model, case.likelihood, 7, **options)


def log_likelihoods(case, output, y, sigma):
    """log p(y_n | f_n) summed over positions and outputs, by torch's own losses."""
    if case.likelihood == "classification":
        losses = F.cross_entropy(output.flatten(0, -2), y.flatten(), reduction="none")
        return -losses.reshape(len(output), -1).sum(1)
    if case.likelihood == "binary":
        losses = F.binary_cross_entropy_with_logits(output, y, reduction="none")
        return -losses.flatten(1).sum(1)
    losses = (output - y) ** 2 / (2 * sigma**2) + math.log(sigma) + math.log(2 * math.pi) / 2
    return -losses.flatten(1).sum(1)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_loss_formula(name, temperature):
    """(1/B) sum_n -log p / T + 1/(2 n_data) sum delta theta^2; sums over outputs, not means."""
    case = build(name)
    sigma = 0.6 if case.likelihood == "regression" else 1.0
    tuner = tuner_of(case, temperature=temperature, prior_precision=2.5, sigma_noise=sigma)
    x, y = case.batches[0]
    output = case.model(x)
    expected = -log_likelihoods(case, output, y, sigma).mean() / temperature
    squares = sum(p.square().sum() for p in trainable(case.model))
    expected = expected + 2.5 * squares / (2 * 7)
    torch.testing.assert_close(tuner.loss(output, y), expected)


@pytest.mark.parametrize("name", NAMES)
def test_loss_gradient_is_that_of_the_formula(name):
    """The gradient reaches every trainable parameter through both terms."""
    case = build(name)
    tuner = tuner_of(case, prior_precision=2.5)
    x, y = case.batches[1]
    got = torch.autograd.grad(tuner.loss(case.model(x), y), trainable(case.model))
    nll = -log_likelihoods(case, case.model(x), y, 1.0).mean()
    expected = torch.autograd.grad(nll, trainable(case.model))
    for g, e, p in zip(got, expected, trainable(case.model), strict=True):
        torch.testing.assert_close(g, e + 2.5 * p.detach() / 7)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "vit"])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_loss_is_minimised_where_the_posterior_is_centred(name, temperature):
    """Full batch: n_data d loss = -d (log_likelihood / T - scatter / 2), at today's values."""
    case = build(name)
    tuner = tuner_of(case, temperature=temperature)
    tuner.step(case.batches)  # hyperparameters of no round value
    la = tuner.laplace(case.batches)
    x, y = case.x, case.y
    loss_gradient = torch.autograd.grad(tuner.loss(case.model(x), y), trainable(case.model))
    flat = torch.cat([g.flatten() for g in loss_gradient])

    sigma = float(la.sigma_noise) if case.likelihood == "regression" else 1.0
    likelihood = log_likelihoods(case, case.model(x), y, sigma).sum() / temperature
    gradient = torch.autograd.grad(likelihood, trainable(case.model))
    pull = dense.delta(la, case.model) * dense.theta(la, case.model)
    log_joint = torch.cat([g.flatten() for g in gradient]) - pull
    torch.testing.assert_close(7 * flat, -log_joint, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(la.log_likelihood.detach() / temperature, likelihood.detach())


def test_hyperparameters_are_detached():
    case = build("mlp-regression")
    tuner = tuner_of(case)
    loss = tuner.loss(case.model(case.x), case.y)
    loss.backward()
    for value in tuner.hyperparameters().values():
        assert not value.requires_grad and value.grad is None
    assert all(p.grad is not None for p in trainable(case.model))


def test_layerwise_precisions_pull_each_layer_on_its_own():
    case = build("mlp-tanh")
    tuner = tuner_of(case, prior_precision=torch.tensor([0.5, 8.0]))
    tuner.prepare(case.batches)  # which layer is first shows only in use
    loss = tuner.loss(case.model(case.x), case.y)
    nll = F.cross_entropy(case.model(case.x), case.y)
    squares = [sum(p.square().sum() for p in case.model[i].parameters()) for i in (0, 2)]
    torch.testing.assert_close(loss, nll + (0.5 * squares[0] + 8 * squares[1]) / 14)


def test_frozen_parameters_are_not_pulled():
    case = build("frozen-bias")
    tuner = tuner_of(case, prior_precision=3.0)
    loss = tuner.loss(case.model(case.x), case.y)
    squares = sum(p.square().sum() for p in trainable(case.model))
    expected = F.cross_entropy(case.model(case.x), case.y) + 3 * squares / 14
    torch.testing.assert_close(loss, expected)


def test_prior_mean_shifts_the_pull():
    case = build("mlp-tanh")
    tuner = tuner_of(case, prior_mean=0.2, prior_precision=2.0)
    squares = sum((p - 0.2).square().sum() for p in trainable(case.model))
    expected = F.cross_entropy(case.model(case.x), case.y) + 2 * squares / 14
    torch.testing.assert_close(tuner.loss(case.model(case.x), case.y), expected)


def test_mean_of_batch_losses_estimates_the_full_one():
    """Unequal batches weighted by size add up to the full-batch loss."""
    case = build("mlp-tanh")
    tuner = tuner_of(case)
    whole = tuner.loss(case.model(case.x), case.y)
    parts = sum(len(x) * tuner.loss(case.model(x), y) for x, y in case.batches) / 7
    torch.testing.assert_close(parts, whole)


def test_single_precision_models_get_a_single_precision_loss():
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model.float(), "classification", 7)
    loss = tuner.loss(case.model(case.x.float()), case.y)
    assert loss.dtype == torch.float32 and loss.shape == ()


PARTS = {
    "last layer": ({"subset_of_weights": "last_layer"}, ("head.",)),
    "globs": ({"subset_of_weights": ["mlp.*"]}, ("mlp.",)),
    "freeze": ({"uncovered": "freeze"}, ("patch.", "norm.", "attention.", "mlp.", "head.")),
}


@pytest.mark.parametrize(("options", "inside"), PARTS.values(), ids=PARTS.keys())
def test_only_parameters_of_the_posterior_are_pulled(options, inside):
    """The loss has the scatter of the posterior that will be fitted."""
    case = build("vit")
    tuner = tuner_of(case, prior_precision=3.0, **options)
    tuner.prepare(case.batches)
    squares = sum(
        p.square().sum() for name, p in case.model.named_parameters() if name.startswith(inside)
    )
    la = Laplace(case.model, "classification", prior_precision=3.0, **options).fit(case.batches)
    torch.testing.assert_close(la.scatter, 3 * squares.detach())
    expected = F.cross_entropy(case.model(case.x), case.y) + 3 * squares / 14
    torch.testing.assert_close(tuner.loss(case.model(case.x), case.y), expected)


@pytest.mark.parametrize("part", PARTS)
def test_the_first_epoch_pulls_the_same_parameters_or_asks_for_prepare(part):
    """Which layer is last, or uncovered, shows only in use: an error, never another loss."""
    case, (options, _) = build("vit"), PARTS[part]
    prepared, fresh = tuner_of(case, **options), tuner_of(case, **options)
    prepared.prepare(case.batches)
    output = case.model(case.x)
    if part == "globs":
        torch.testing.assert_close(fresh.loss(output, case.y), prepared.loss(output, case.y))
    else:
        with pytest.raises(InvalidValue, match="prepare"):
            fresh.loss(output, case.y)
    fresh.step(case.batches)
    fresh.loss(output, case.y)
