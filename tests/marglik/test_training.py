"""`marglik_training`: laplace-torch's signature and returns, built on the tuner."""

import functools
import inspect
import math

import pytest
import torch
from cases import build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import KfacLaplaceError, Laplace, marglik_training
from kfac_laplace.optim import KFAC, Estimate

# The names that laplace-torch users have in their fingers; backend belongs to laplace-torch alone.
NAMES = (
    "model train_loader likelihood hessian_structure optimizer_cls optimizer_kwargs scheduler_cls "
    "scheduler_kwargs n_epochs lr_hyp prior_structure n_epochs_burnin n_hypersteps "
    "marglik_frequency prior_prec_init sigma_noise_init temperature fix_sigma_noise progress_bar "
    "dict_key_y"
).split()


def test_signature():
    parameters = inspect.signature(marglik_training).parameters
    assert set(NAMES) <= set(parameters)
    assert {"kfac_approx", "fisher"} <= set(parameters)
    assert list(parameters)[:4] == NAMES[:4]
    defaults = {name: parameters[name].default for name in NAMES[2:4]}
    assert defaults == {"likelihood": "classification", "hessian_structure": "kron"}


def loader_of(case):
    return DataLoader(TensorDataset(case.x, case.y), batch_size=4)


def run(name, **options):
    case = build(name)
    options = {"n_epochs": 6, "optimizer_kwargs": {"lr": 0.01}} | options
    return case, marglik_training(case.model, loader_of(case), case.likelihood, **options)


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "cnn"])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_returns(name, structure, keep):
    case, (la, model, margliks, losses) = run(name, hessian_structure=structure, keep=keep)
    assert isinstance(la, Laplace) and isinstance(model, nn.Module)
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    if name != "mlp-regression":  # whose noise moves the loss as well
        assert losses[-1] < losses[0]
    assert len(margliks) == 6
    # negative log evidences; the returned posterior is that of the last weights, or of the best
    kept = margliks[-1] if keep == "last" else min(margliks)
    assert -float(la.log_marginal_likelihood()) == pytest.approx(kept, abs=1e-6)
    assert torch.isfinite(la.prior_precision).all()
    assert la.n_data == 7


def test_returned_posterior_is_at_the_returned_models_weights():
    case, (la, model, _, _) = run("mlp-tanh")
    again = Laplace(model, "classification").fit(loader_of(case))
    got = again.log_marginal_likelihood(prior_precision=la.prior_precision.detach())
    torch.testing.assert_close(got, la.log_marginal_likelihood())


def test_hyperparameters_are_tuned_after_the_burn_in_only():
    _, (la, _, margliks, _) = run("mlp-tanh", n_epochs_burnin=100, prior_prec_init=2.0)
    torch.testing.assert_close(
        la.prior_precision.detach(), torch.full_like(la.prior_precision.detach(), 2.0)
    )
    assert margliks == []
    _, (la, _, margliks, _) = run("mlp-tanh", n_epochs_burnin=2, prior_prec_init=2.0)
    assert len(margliks) > 0 and not torch.allclose(
        la.prior_precision.detach(), torch.full_like(la.prior_precision.detach(), 2.0)
    )


def test_fixed_noise_stays_and_free_noise_moves():
    _, (fixed, *_) = run("mlp-regression", sigma_noise_init=0.5, fix_sigma_noise=True)
    assert float(fixed.sigma_noise) == pytest.approx(0.5, abs=1e-12)
    _, (free, *_) = run("mlp-regression", sigma_noise_init=0.5)
    assert float(free.sigma_noise) != pytest.approx(0.5, abs=1e-3)


def test_the_callers_options_are_not_written_to():
    options = {"lr": 0.01, "betas": (0.8, 0.9)}
    schedule = {"step_size": 2}
    run(
        "mlp-tanh",
        optimizer_kwargs=options,
        scheduler_cls=torch.optim.lr_scheduler.StepLR,
        scheduler_kwargs=schedule,
    )
    assert options == {"lr": 0.01, "betas": (0.8, 0.9)} and schedule == {"step_size": 2}


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_as_it_was(training):
    case = build("mlp-tanh")
    case.model.train(training)
    marglik_training(case.model, loader_of(case), "classification", n_epochs=3)
    assert case.model.training is training


def test_weight_decay_is_refused_because_the_prior_is_the_weight_decay():
    """laplace-torch overwrites the caller's dictionary instead."""
    options = {"lr": 0.01, "weight_decay": 0.1}
    with pytest.raises(KfacLaplaceError, match="weight_decay"):
        run("mlp-tanh", optimizer_kwargs=options)
    assert options == {"lr": 0.01, "weight_decay": 0.1}


def test_an_optimisers_own_default_of_weight_decay_is_no_second_prior():
    """AdamW's is 0.01 where nothing is said: without it, it is Adam, bit by bit."""
    weights = []
    made = functools.partial(torch.optim.AdamW, eps=1e-8)
    for optimizer_cls in (torch.optim.Adam, torch.optim.AdamW, made):
        case = build("mlp-tanh")
        marglik_training(
            case.model, loader_of(case), case.likelihood, n_epochs=3, optimizer_cls=optimizer_cls
        )
        weights.append(torch.cat([p.detach().flatten() for p in case.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "vit"])
def test_kfac_trains(name):
    """By its options and factors: the loss falls, and it is not what Adam does."""
    case = build(name)
    options = {"lr": 0.02, "curvature": Estimate(every=2, bases_every=2)}
    la, model, _, losses = marglik_training(
        case.model,
        loader_of(case),
        case.likelihood,
        n_epochs=8,
        optimizer_cls=KFAC,
        optimizer_kwargs=options,
    )
    assert losses[-1] < losses[0]
    assert model is case.model and bool(la.log_marginal_likelihood().isfinite())
    by_adam = build(name)
    marglik_training(
        by_adam.model,
        loader_of(by_adam),
        by_adam.likelihood,
        n_epochs=8,
        optimizer_kwargs={"lr": 0.02},
    )
    assert not model._forward_hooks and not model._forward_pre_hooks
    pairs = zip(model.parameters(), by_adam.model.parameters(), strict=True)
    assert not all(torch.equal(one, other) for one, other in pairs)


def test_optimiser_class_and_schedule_are_used():
    """SGD with a zero learning rate leaves the weights; the scheduler steps once a batch."""
    steps = []

    class Counting(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *args):
            steps.append(1)
            super().step(*args)

    case = build("mlp-tanh")
    before = [p.detach().clone() for p in case.model.parameters()]
    marglik_training(
        case.model,
        loader_of(case),
        "classification",
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 0.0},
        scheduler_cls=Counting,
        scheduler_kwargs={"lr_lambda": lambda _: 1.0},
        n_epochs=3,
    )
    for p, b in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(p, b)
    assert len(steps) - 1 == 3 * 2  # the constructor steps once


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_kfac_approx_and_fisher_reach_the_curvature(setting):
    _, (la, *_) = run("cnn", kfac_approx=setting, fisher="mc", n_epochs=2)
    assert set(la.curvature.settings.values()) == {setting}


def test_global_rng_drives_only_the_callers_loader():
    """Two runs from the same weights and seed agree."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        _, (la, *_) = run("mlp-tanh")
        results.append(la.log_marginal_likelihood().detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_bad_data_raise_and_give_the_mode_back(training):
    """NaN inputs and empty loaders; laplace-torch trains on and returns NaN."""
    case = build("mlp-tanh")
    case.model.train(training)
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    broken = [(torch.full_like(case.x, torch.nan), case.y)]
    for loader in (broken, []):
        with pytest.raises(KfacLaplaceError):
            marglik_training(case.model, loader, "classification", n_epochs=2)
        assert case.model.training is training
        for name, value in case.model.state_dict().items():
            assert torch.equal(value, before[name])


def test_a_vector_of_initial_precisions():
    """One for each layer, from the first epoch on."""
    start = torch.tensor([0.5, 8.0])
    _, (la, *_) = run("mlp-tanh", prior_prec_init=start, n_epochs_burnin=100)
    torch.testing.assert_close(la.prior_precision.detach(), start.double())


def test_dropout_is_on_while_training():
    """Every epoch trains in train mode; the curvature passes run in eval mode."""

    class Watched(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.modes = net, []

        def forward(self, x):
            self.modes.append(self.training)
            return self.net(x)

    case = build("mlp-tanh")
    model = Watched(case.model).eval()
    marglik_training(model, [(case.x, case.y)], "classification", n_epochs=4)
    assert sum(model.modes) == 4 and not model.training
