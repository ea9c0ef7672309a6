"""What the outputs of training mode depend on, and what the tuner makes of it."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from marglik.small_networks import Transformer, made, rows, said, sequences, trained
from torch import nn

from kfac_laplace import MarglikTuner


def with_batch_norm(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs))


def with_layer_norm():
    return nn.Sequential(
        nn.Linear(4, 6, bias=False),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


class Mixing(nn.Module):
    """Statistics of the batch in training, by no module of torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h - h.mean(0) if self.training else h))


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.dropout(torch.tanh(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("build", [with_batch_norm, Mixing])
def test_with_batch_statistics_no_precision_is_tuned(build, caplog):
    model = made(build)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        records = trained(model, tuner, [rows()])
    deltas = {float(d) for r in records for d in r.hyperparameters["prior_precision"]}
    assert deltas == {20 * 1e-4}
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "no precision is tuned" in text]) == 1
    assert set(tuner.coverage) == {
        name for name, how in tuner.coverage.items() if "batch statistics" in how
    }


def test_batch_statistics_that_training_does_not_use_do_not_matter():
    """A network trained in evaluation mode, as for fine-tuning."""
    model = made(with_batch_norm).eval()
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    trained(model, tuner, [rows()])
    assert said(tuner, "tuned") == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_noise_is_tuned_with_batch_statistics_too():
    model = made(lambda: with_batch_norm(1))
    x, _ = rows()
    tuner = MarglikTuner(model, "regression", 20, n_epochs_burnin=1)
    trained(model, tuner, [(x, x[:, :1])])
    assert float(tuner.hyperparameters()["sigma_noise"]) != 1
    assert (tuner.hyperparameters()["prior_precision"] == 20 * 1e-4).all()


def test_weights_in_front_of_a_norm_are_held():
    model = made(with_layer_norm)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    trained(model, tuner, [rows()])
    assert said(tuner, "held: its scale changes no output") == {"0.weight"}
    assert said(tuner, "tuned") == {"3.weight", "3.bias"}


@pytest.mark.parametrize("build", [Dropped, Transformer])
def test_dropout_and_norms_elsewhere_leave_the_layers_tuned(build):
    model = made(build)
    loader = [rows() if build is Dropped else sequences()]
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    trained(model, tuner, loader)
    assert not said(tuner, "its scale") and not said(tuner, "batch statistics")
    assert said(tuner, "tuned") >= {n for n, p in model.named_parameters() if p.ndim == 2}


def test_a_layer_without_effect_is_not_called_scale_free():
    """The last matrix of a branch is zero, so that nothing of the branch reaches the output yet."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.outer = (nn.Linear(4, 4) for _ in range(3))
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

        def forward(self, x):
            return self.stem(x) + self.outer(torch.tanh(self.inner(x)))

    model = made(Branch)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    tuner.loss(model(rows()[0]), rows()[1])
    tuner.step([rows()])
    assert not said(tuner, "its scale changes no output")


def test_looking_at_training_mode_leaves_the_model_as_it_was():
    """Running statistics, modes and the global random numbers."""
    model = made(lambda: nn.Sequential(*with_batch_norm()[:3], nn.Dropout(0.5), nn.Linear(6, 3)))
    model[1].momentum = 0.3
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    tuner.loss(model(rows()[0]), rows()[1])
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    tuner.step([rows()])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples(n):
    """Batch norm refuses a single example; then its type tells."""
    model = made(with_batch_norm)
    x, y = rows(8)
    tuner = MarglikTuner(model, "classification", 8, n_epochs_burnin=1)
    tuner.loss(model(x), y)
    tuner.step([(x[:n], y[:n]), (x[n:], y[n:])])
    assert said(tuner, "batch statistics") == {n for n, _ in model.named_parameters()}


def test_a_resumed_tuner_tunes_the_same():
    model = made(with_layer_norm)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    trained(model, tuner, [rows()])
    other = MarglikTuner(model, "classification", 20, n_epochs_burnin=1)
    other.load_state_dict(tuner.state_dict())
    assert other.coverage == tuner.coverage
    assert torch.equal(
        *(t.step([rows()]).hyperparameters["prior_precision"] for t in (tuner, other))
    )
