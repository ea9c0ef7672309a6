"""What laplace-torch 0.3 gets wrong in marginal-likelihood training, each run against it."""

import pytest
import torch
from peers import peer
from torch import nn

from kfac_laplace import marglik_training

LINEAR = {"n_epochs": 600, "optimizer_kwargs": {"lr": 0.02}, "prior_prec_init": 30.0}


def linear_regression():
    """Two inputs, three outputs, one matrix: the MAP is a linear system."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64, generator=draw)
    w = torch.randn(2, 3, dtype=torch.float64, generator=draw)
    y = x @ w + 0.1 * torch.randn(20, 3, dtype=torch.float64, generator=draw)
    model = peer.seeded(lambda: nn.Linear(2, 3, bias=False))
    return model, x, y


def likelihood_power(la, model, x, y):
    """The a for which the weights maximise a log p(D | w) + log p(w) at la's own prior."""
    w = model.weight.detach()
    gradient = ((y - x @ w.T).T @ x).flatten()  # of log p(D | w) at sigma = 1
    pull = la.prior_precision.detach().reshape(-1) * w.flatten()
    power = float(gradient @ pull / (gradient @ gradient))
    assert (power * gradient - pull).norm() < 1e-5 * pull.norm()  # converged
    return power


def train(ours, temperature=1.0, structure="full"):
    """The posterior and model of either library, hyperparameters never updated."""
    model, x, y = linear_regression()
    options = {**LINEAR, "n_epochs_burnin": 1000, "temperature": temperature}
    loader = peer.loader(x, y, 20)
    if ours:
        la, model, *_ = marglik_training(model, loader, "regression", structure, **options)
    else:
        la, model, *_ = peer.laplace.marglik_training(
            model, loader, "regression", structure, peer.curvature.CurvlinopsGGN, **options
        )
    return la, model, x, y


@pytest.mark.slow
def test_multi_output_regression_reaches_the_map_of_its_own_posterior():
    """A mean over outputs trains likelihood^(1/C)."""
    assert likelihood_power(*train(ours=False)) == pytest.approx(1 / 3, rel=1e-4)
    assert likelihood_power(*train(ours=True)) == pytest.approx(1, rel=1e-4)


@pytest.mark.slow
def test_temperature_means_the_same_in_training_and_in_the_posterior():
    """Likelihood^(1/T) in both; the peer trains likelihood^T and stores likelihood^(1/T)."""
    temperature = 0.5
    la, model, x, y = train(ours=True, temperature=temperature)
    assert likelihood_power(la, model, x, y) == pytest.approx(1 / temperature, rel=1e-4)
    h = torch.kron(torch.eye(3, dtype=torch.float64), x.T @ x)
    p = la.prior_precision.detach().reshape(-1) * torch.eye(6, dtype=torch.float64) + h / 0.5
    torch.testing.assert_close(la.log_det_posterior_precision, p.logdet(), rtol=1e-6, atol=1e-6)

    theirs = likelihood_power(*train(ours=False, temperature=temperature))
    assert theirs == pytest.approx(temperature / 3, rel=1e-4)


class Watched(nn.Module):
    """Remembers the mode of every forward pass that asks for gradients of the weights."""

    def __init__(self):
        super().__init__()
        self.net, self.modes = peer.mlp(), []

    def forward(self, x):
        self.modes.append(self.training)
        return self.net(x)


def test_training_mode_is_the_callers():
    """The peer's fit leaves the model in eval mode: dropout is off from the second epoch on."""
    x, y = peer.data("classification", 5)
    loader = peer.loader(x, y, 24)
    theirs = Watched()
    peer.laplace.marglik_training(
        theirs, loader, "classification", "kron", peer.curvature.CurvlinopsGGN, n_epochs=4
    )
    assert not theirs.training and sum(theirs.modes) == 1

    ours = Watched()
    marglik_training(ours, loader, "classification", "kron", n_epochs=4)
    assert ours.training and sum(ours.modes) == 4  # one training pass an epoch


def test_the_callers_optimizer_options_stay():
    """The peer sets weight_decay to zero in the dictionary that it was given."""
    x, y = peer.data("classification", 5)
    loader, options = peer.loader(x, y, 24), {"lr": 0.01, "weight_decay": 0.1}
    given = dict(options)
    with pytest.warns(UserWarning, match="[Ww]eight decay"):
        peer.laplace.marglik_training(
            peer.mlp(),
            loader,
            "classification",
            "kron",
            peer.curvature.CurvlinopsGGN,
            optimizer_kwargs=given,
            n_epochs=1,
        )
    assert given["weight_decay"] == 0
    given = {"lr": 0.01}
    marglik_training(peer.mlp(), loader, "classification", optimizer_kwargs=given, n_epochs=1)
    assert given == {"lr": 0.01}
