"""Rewards from preferences: a logistic likelihood of differences, and Gaussians over rewards."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue

STRUCTURES = ["kron", "ekfac", "diag", "full"]


class Rewards(nn.Module):
    """A reward for each input (n, d), or two for each pair (n, 2, d)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        rewards = self.net(x.reshape(-1, x.shape[-1]))
        return rewards.reshape(-1, 2) if x.ndim == 3 else rewards


@pytest.fixture
def pairs():
    """A model, pairs with preferences in two batches, and single inputs."""
    model = Rewards().double()
    x = torch.randn(12, 2, 3, dtype=torch.float64)
    y = torch.randint(2, (12,))
    return model, x, y, torch.randn(5, 3, dtype=torch.float64)


def batches(x, y):
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def differences(model, x):
    rewards = model(x)
    return rewards[:, 1:] - rewards[:, :1]


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_it_is_the_logistic_likelihood_of_the_difference(structure, pairs):
    """One logit r₁ − r₀: the same curvature, evidence and optimum."""
    model, x, y, _ = pairs
    la = Laplace(model, "reward_modeling", hessian_structure=structure).fit(batches(x, y))
    other = Laplace(model, "binary", hessian_structure=structure, forward_fn=differences)
    other.fit([(a, b[:, None].double()) for a, b in batches(x, y)])
    for name, block in la.curvature.blocks.items():
        torch.testing.assert_close(block.dense(), other.curvature.blocks[name].dense())
    for each in (la, other):
        each.log_marginal_likelihood(prior_precision=0.6)
    torch.testing.assert_close(la.log_marginal_likelihood(), other.log_marginal_likelihood())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictions_are_rewards_with_their_covariance(structure, pairs):
    """Of single inputs and of pairs, by the dense formula with the blocks' matrices."""
    model, x, y, single = pairs
    la = Laplace(model, "reward_modeling", hessian_structure=structure, prior_structure="scalar",
                 prior_precision=0.6).fit(batches(x, y))  # fmt: skip
    names = [name for name, _ in model.named_parameters()]
    assert [n for block in la.curvature.blocks.values() for n in block.params] == names
    dense = torch.block_diag(*[block.dense() for block in la.curvature.blocks.values()])
    delta = torch.full((len(dense),), 0.6, dtype=torch.float64)
    for inputs in (single, x):
        f, variance = la(inputs)
        torch.testing.assert_close(f, model(inputs).detach())
        jacobian = oracles.parameter_jacobian(model(inputs), model, names)
        torch.testing.assert_close(variance, oracles.glm_covariance(jacobian, dense, 1.0, delta))
    assert (
        la.functional_samples(single, 4).shape
        == la.predictive_samples(single, 4).shape
        == (4, 5, 1)
    )
    distribution = la.predict(single).distribution()
    torch.testing.assert_close(distribution.mean, la(single)[0])


def test_preferences_of_pairs_average_over_the_difference(pairs):
    """Against a fine sum over the one Gaussian difference; averages over draws are as near."""
    model, x, y, _ = pairs
    la = Laplace(model, "reward_modeling", prior_precision=0.2).fit(batches(x, y))
    f, covariance = la(x)
    mean = f[:, 1] - f[:, 0]
    variance = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    weights = torch.exp(-0.5 * z**2) / torch.exp(-0.5 * z**2).sum()
    want = (weights * torch.sigmoid(mean + z * variance.sqrt())).sum(0)
    probs = la.predict(x).probs
    # The probit approximation is off by at most 0.02 at any mean and variance.
    torch.testing.assert_close(probs[:, 1], want, rtol=0, atol=0.02)
    torch.testing.assert_close(probs.sum(1), torch.ones(12, dtype=torch.float64))


def test_held_out_preferences_choose_the_scale(pairs, tmp_path):
    model, x, y, single = pairs
    la = Laplace(model, "reward_modeling").fit(batches(x[:8], y[:8]), [(x[8:], y[8:])])
    la.optimize_prior()
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", model)
    for ours, other in zip(la(single), loaded(single), strict=True):
        assert torch.equal(ours, other)
    assert float(la.predictive_temperature) == 1
    assert "NLL" in str(la.report([(x, y)]))


def test_a_tuner_trains_by_preferences(pairs):
    model, x, y, single = pairs
    tuner = MarglikTuner(model, "reward_modeling", 12, n_epochs_burnin=1)
    loss = tuner.loss(model(x), y)
    penalty = (
        0.5
        / 12
        * sum(
            (tuner.hyperparameters()["prior_precision"].mean() * p.double().square()).sum()
            for p in model.parameters()
        )
    )
    bce = nn.functional.binary_cross_entropy_with_logits(differences(model, x)[:, 0], y.double())
    torch.testing.assert_close(loss, bce + penalty)
    tuner.step(batches(x, y))
    tuner.step(batches(x, y))
    assert tuner.laplace(batches(x, y))(single)[1].shape == (5, 1, 1)


def test_what_is_no_pair_is_refused(pairs):
    model, x, y, single = pairs
    la = Laplace(model, "reward_modeling")
    with pytest.raises(InvalidValue, match=r"got shape \(5, 1\).*reshape\(-1, 2\)"):
        la.fit([(single, torch.zeros(5, dtype=torch.int64))])
    with pytest.raises(InvalidValue, match=r"got shape \(12, 2, 1\)"):
        Laplace(model.net, "reward_modeling").fit([(x, y)])
    with pytest.raises(InvalidType, match="labels must be integers"):
        la.fit([(x, y.double())])
    with pytest.raises(InvalidValue, match=r"outside 0\.\.1"):
        la.fit([(x, y + 1)])
    la.fit([(x, y)])
    for score in ("entropy", "epistemic", "aleatoric"):
        with pytest.raises(InvalidValue, match="never observed"):
            getattr(la.predict(single), score)
    with pytest.raises(InvalidValue, match="never observed"):
        la.report([(x, y)], ood_loader=[single])
    with pytest.raises(InvalidValue, match="2 axes are expected"):
        la(single[0])
    with pytest.raises(InvalidValue, match="no class probabilities"):
        _ = la.predict(single).probs


def test_certain_rewards_have_no_density(pairs):
    """At κ = 0 nothing is left that a distribution could be of; of pairs there is."""
    model, x, y, single = pairs
    la = Laplace(model, "reward_modeling").fit(batches(x, y))
    wide = la.predict(single).distribution()
    torch.testing.assert_close(wide.covariance_matrix, la(single)[1])
    la.posterior_scale = 0.0
    torch.testing.assert_close(la(single)[0], model(single))
    for pred_type in ("glm", "linear", "nn"):  # equal draws have no spread, by rounding either
        with pytest.raises(InvalidValue, match="without variance.*of 5 in 5 inputs"):
            la.predict(single, pred_type).distribution()
    assert la.predict(x).distribution().logits.shape == (12, 2)
