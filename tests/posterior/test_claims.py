"""What a search says of its result: γ beyond the data, σ beyond the targets, dead networks."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.likelihoods import Bernoulli, Categorical, Gaussian


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def trained(model: nn.Module, x: Tensor, y: Tensor, loss, steps: int = 300) -> nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model(x), y).backward()
        optimiser.step()
    return model


def mlp(outputs: int = 1, inputs: int = 1, width: int = 16) -> nn.Sequential:
    torch.manual_seed(1)
    layers = (nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(width, outputs)).double()


def sine(n: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    return x, (2 * x).sin() + 0.02 * torch.randn(n, 1, dtype=torch.float64, generator=draws(1))


def blobs(n: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    centres = 1.5 * torch.randn(classes, 4, dtype=torch.float64, generator=draws(1))
    y = torch.randint(0, classes, (n,), generator=draws(2))
    return centres[y] + torch.randn(n, 4, dtype=torch.float64, generator=draws(3)), y


@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_gamma_beyond_twelve_points(method, caplog):
    """Block-diagonal curvature of 12 points and 300 weights; its noise, and the full one's."""
    x, y = sine(12)
    model = trained(mlp(), x, y, F.mse_loss)
    la = Laplace(model, "regression").fit([(x, y)]).optimize_prior(method)
    gamma = float(la.posterior.effective_dimensions().sum())
    assert gamma > 0.9 * 12
    said = " ".join(warned(caplog))
    for remedy in (
        "subset_of_weights",
        "hessian_structure='full'",
        "fix_sigma_noise",
        "validation",
    ):
        assert remedy in said
    assert f"{12} are possible" in said
    if float(la.sigma_noise) > 1.2 * float(y.std()):
        assert "beyond the spread of the targets" in said


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_ordinary_networks_are_quiet(method, kind, caplog):
    x, labels = blobs(120)
    if kind == "regression":
        y = x[:, :2].sin() + 0.3 * torch.randn(120, 2, dtype=torch.float64, generator=draws(4))
        model = trained(mlp(2, 4, 6), x, y, F.mse_loss, 100)
    elif kind == "binary":
        y = (labels == 0).double()[:, None]
        model = trained(mlp(1, 4, 6), x, y, F.binary_cross_entropy_with_logits, 40)
    else:
        y, model = labels, trained(mlp(3, 4, 6), x, labels, F.cross_entropy, 40)
    Laplace(model, kind).fit([(x, y)]).optimize_prior(method)
    assert not warned(caplog)


def test_gamma_of_ignored_tokens_counts_labels_alone(caplog):
    """Rows of padding are no data: 20 labels of 3 classes determine 40 directions at the most."""
    x = torch.randn(10, 8, 4, dtype=torch.float64, generator=draws(5))
    y = torch.full((10, 8), -100)
    y[:, :2] = torch.randint(0, 3, (10, 2), generator=draws(6))
    la = Laplace(mlp(3, 4, 30), prior_precision=1e-4).fit([(x, y)])
    posterior = la.posterior
    assert posterior.ggn.likelihood.determined(posterior.ggn.targets, posterior.ggn.n_outputs) == 40
    assert float(posterior.effective_dimensions().sum()) > 40
    tuner = MarglikTuner(mlp(3, 4, 30), "classification", 10, prior_precision=1e-4, lr_hyp=1e-9)
    for _ in range(3):
        tuner.step([(x, y)])
    assert len([text for text in warned(caplog) if "40 are possible" in text]) == 1


def test_a_noise_that_is_fixed_is_the_users_own(caplog):
    x, y = sine(40)
    model = trained(mlp(1, 1, 4), x, y, F.mse_loss, 50)
    la = Laplace(model, "regression", sigma_noise=50.0).fit([(x, y)])
    la.optimize_prior(fix_sigma_noise=True)
    assert not warned(caplog)


def test_residuals_of_zero_where_gamma_is_too_large(caplog):
    """12 points, 41 weights, diagonal curvature: σ has to rise although nothing is left over."""
    torch.manual_seed(0)
    x, model = torch.randn(12, 40).double(), nn.Linear(40, 1).double()
    data = [(x, model(x).detach())]
    la = Laplace(model, "regression", hessian_structure="diag", sigma_noise=0.01).fit(data)
    start = la.log_marginal_likelihood()
    la.optimize_prior()
    hessian = torch.cat([x.square().sum(0), torch.full((1,), 12.0).double()])
    values = hessian / la.sigma_noise**2
    gamma = (values / (values + la.prior_precision)).sum()
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert float(gamma) == pytest.approx(12, abs=1e-3)  # the fixed point of σ
    assert float(la.prior_precision) == pytest.approx(float(gamma / theta.square().sum()), rel=1e-4)
    (said, about_noise) = warned(caplog)
    assert "12 are possible" in said and "beyond the spread" in about_noise
    # MacKay's σ swings about this one, where RSS/(N − γ) is 0/0, and gets there slowly.
    other = Laplace(model, "regression", hessian_structure="diag", sigma_noise=0.01).fit(data)
    other.optimize_prior("mackay")
    assert float(start) + 10 < float(other.log_marginal_likelihood())
    torch.testing.assert_close(
        other.log_marginal_likelihood(), la.log_marginal_likelihood(), rtol=0, atol=0.5
    )


def test_a_noise_beyond_the_spread(caplog):
    """A network that is worse than the mean: residuals of 4 around targets of spread 0.7."""
    x, y = sine(40)
    model = mlp(1, 1, 4)
    with torch.no_grad():
        model[-1].bias += 4
    Laplace(model, "regression").fit([(x, y)]).optimize_prior()
    (said,) = warned(caplog)
    spread = float((y - y.mean()).square().mean().sqrt())
    assert f"beyond the spread of the targets, {spread:.3g}" in said


# --- the constant predictor ------------------------------------------------------------------


def test_a_round_before_anything_is_learned_speaks_of_no_residuals(caplog):
    """σ rises to the spread of the targets, where its range ends: no fit without residuals."""
    x, y = sine(40)
    spread = float((y - y.mean()).square().mean().sqrt())
    model = trained(mlp(1, 1, 30), x, y, F.mse_loss, 10)
    start, few = 0.5 * spread, {"prior_precision": 1e-6, "n_hypersteps": 200}
    tuner = MarglikTuner(model, "regression", 40, sigma_noise=start, n_epochs_burnin=1, **few)
    record = tuner.step([(x, y)])
    assert float(record.hyperparameters["sigma_noise"]) == pytest.approx(spread, rel=1e-9)
    assert 0.5 * spread**2 < F.mse_loss(model(x), y) < spread**2
    assert not [said for said in warned(caplog) if "sigma_noise" in said]


def constant_of(kind: str, y: Tensor, likelihood) -> float:
    """The best constant outputs, by gradient descent on the loss itself."""
    c = {"gaussian": 2, "binary": 2}.get(kind, 3)
    f = torch.zeros(c, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [f, log_sigma], max_iter=300, tolerance_grad=1e-12, tolerance_change=0
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        outputs = f.expand(*y.shape[:2], c)
        value = -likelihood.log_prob(outputs, y, log_sigma.exp()).sum()
        value = value + 0 * log_sigma
        value.backward()
        return value

    for _ in range(3):
        optimiser.step(loss)
    return -float(loss().detach())


CONSTANTS = {
    "softmax": Categorical(),
    "weighted": Categorical(weight=[0.5, 1.0, 3.0], label_smoothing=0.1),
    "smoothed": Categorical(label_smoothing=0.2),
    "binary": Bernoulli(),
    "weighted binary": Bernoulli(pos_weight=[2.0, 0.5]),
    "gaussian": Gaussian(),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_the_best_constant(kind):
    """Sums of two halves of the targets give the log-likelihood of the best outputs for all."""
    likelihood = CONSTANTS[kind]
    if "binary" in kind:
        y = (torch.rand(9, 2, 2, dtype=torch.float64, generator=draws(7)) < 0.3).double()
        kind = "binary"
    elif kind == "gaussian":
        y = 3 + torch.randn(9, 2, 2, dtype=torch.float64, generator=draws(7))
    else:
        y = torch.randint(0, 3, (9, 2), generator=draws(7))
        y[0, 0] = -100
    c = 3 if y.ndim == 2 else 2
    halves = [
        likelihood.target_sums(part, part.new_zeros(*part.shape[:2], c).double())
        for part in (y[:4], y[4:])
    ]
    got = likelihood.constant_log_likelihood(likelihood.joined_sums(*halves))
    assert got == pytest.approx(constant_of(kind, y, likelihood), rel=1e-8)


def test_likelihoods_without_one_make_no_claim():
    la = Laplace(mlp(1, 1, 4), "studentt")
    la.fit([(sine(6)[0], torch.ones(6, 1, dtype=torch.float64))])
    assert math.isnan(la.likelihood.constant_log_likelihood(la.curvature.ggn.targets))
    la.optimize_prior()


def test_the_sums_are_added_weighed_merged_and_saved(tmp_path):
    x, y = blobs(12)
    model = mlp(3, 4, 4)
    la = Laplace(model).fit([(x[:5], y[:5]), (x[5:], y[5:])])
    counts = torch.bincount(y, minlength=3).double()
    assert torch.equal(la.curvature.ggn.targets[0], counts)
    assert torch.equal(la.curvature.ggn.scaled(0.5).targets[0], counts / 2)
    other = Laplace(model).fit([(x[:5], y[:5])])
    other.curvature.merge(Laplace(model).fit([(x[5:], y[5:])]).curvature)
    assert torch.equal(other.curvature.ggn.targets[0], counts)
    la.save(tmp_path / "la.pt")
    assert torch.equal(Laplace.load(tmp_path / "la.pt", model).curvature.ggn.targets[0], counts)


@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_a_network_killed_by_its_start(kind, method, caplog):
    """δ = 1e6 from the start: said once, with the constant's log-likelihood and by layer."""
    x, labels = blobs(60)
    y, outputs = labels, 3
    if kind != "classification":
        y, outputs = (labels == 0).double()[:, None], 1
    model = mlp(outputs, 4, 8)
    tuner = MarglikTuner(model, kind, 60, prior_precision=1e6, method=method)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimiser.zero_grad()
        tuner.loss(model(x), y).backward()
        optimiser.step()
        tuner.step([(x, y)])
    said = [text for text in warned(caplog) if "no better than a constant" in text]
    assert len(said) == 1
    assert "4.weight (" in said[0]  # precisions wait, whatever the method: nothing was learned
    if kind == "classification":
        frequencies = torch.bincount(y) / len(y)
        assert f"constant's {float(60 * (frequencies * frequencies.log()).sum()):.6g}" in said[0]


def test_networks_that_begin_are_not_called_dead(caplog):
    x, y = blobs(60)
    model = mlp(3, 4, 8)
    tuner = MarglikTuner(model, "classification", 60)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tuner.step([(x, y)])  # before any training
    for _ in range(12):
        for part in range(0, 60, 20):
            optimiser.zero_grad()
            tuner.loss(model(x[part : part + 20]), y[part : part + 20]).backward()
            optimiser.step()
        tuner.step([(x, y)])
    assert not warned(caplog)
