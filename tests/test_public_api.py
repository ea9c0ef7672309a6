"""The contract: names, defaults, and the one-minute tour."""

import inspect

import pytest
import torch
from cases import build
from torch.utils.data import DataLoader, TensorDataset

import kfac_laplace
from kfac_laplace import Curvature, KfacLaplaceError, Laplace, MarglikTuner

NAMES = (
    "Laplace MarglikTuner marglik_training Curvature Checkpoint Predictive "
    "Exact Hybrid MonteCarlo Empirical Kron LowRank Plan Evidence Columns Bracket GammaHyperprior "
    "Categorical Gaussian Bernoulli BradleyTerry Heteroscedastic Poisson StudentT Likelihood "
    "layer_rule KfacLaplaceError __version__"
).split()

LAPLACE = {
    "hessian_structure": "kron",
    "subset_of_weights": "all",
    "kfac_approx": "auto",
    "fisher": "exact",
    "prior_precision": 1.0,
    "prior_structure": "layerwise",
    "prior_mean": 0.0,
    "sigma_noise": 1.0,
    "temperature": 1.0,
    "joint_bias": True,
    "uncovered": "diag",
    "seed": 0,
}
TUNER = {
    "prior_structure": "layerwise",
    "prior_precision": 1.0,
    "sigma_noise": 1.0,
    "temperature": 1.0,
    "kfac_approx": "auto",
    "fisher": "exact",
    "n_epochs_burnin": 0,
    "marglik_frequency": 1,
    "n_hypersteps": 10,
    "lr_hyp": 0.1,
    "method": "marglik",
}
CALL = {
    "pred_type": "glm",
    "link_approx": "auto",
    "joint": False,
    "n_samples": 100,
    "generator": None,
    "enable_backprop": False,
}


@pytest.mark.parametrize("name", NAMES)
def test_names_import_from_the_top(name):
    assert hasattr(kfac_laplace, name)


def test_nothing_else_is_public():
    modules = {name for name, value in vars(kfac_laplace).items() if inspect.ismodule(value)}
    public = {name for name in vars(kfac_laplace) if not name.startswith("_")} - modules
    assert public | {"__version__"} == set(NAMES)


def options_of(function):
    """What can be passed by name, with defaults; keyword-only after the positional ones."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [(Laplace, LAPLACE), (MarglikTuner, TUNER), (Laplace.__call__, CALL)],
    ids=["Laplace", "MarglikTuner", "call"],
)
def test_documented_defaults(function, defaults):
    options = options_of(function)
    assert {name: options.get(name, "missing") for name in defaults} == defaults


def test_options_of_the_constructors_are_keyword_only():
    for function, positional in ((Laplace, 2), (Curvature, 2), (MarglikTuner, 3)):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) == positional
        assert set(kinds[positional:]) <= {
            inspect.Parameter.KEYWORD_ONLY,
            inspect.Parameter.VAR_KEYWORD,
        }


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "vit"])
def test_the_one_minute_tour(name):
    """API.md's example, word for word but for the epochs."""
    case = build(name)
    model, train_set = case.model, TensorDataset(case.x, case.y)
    train_loader = DataLoader(train_set, batch_size=3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    la = Laplace(model, "classification")
    la.fit(train_loader)
    la.optimize_prior()
    probs = la(case.x)
    assert probs.shape == (7, 3)
    torch.testing.assert_close(probs.sum(1), torch.ones(7, dtype=torch.float64))

    tuner = MarglikTuner(model, "classification", n_data=len(train_set))
    for _ in range(3):
        for x, y in train_loader:
            loss = tuner.loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tuner.step(train_loader)
    la = tuner.laplace(train_loader)
    assert len(tuner.history) == 3
    assert la(case.x).shape == (7, 3)


def test_attributes_of_a_fitted_posterior():
    case = build("vit")
    la = Laplace(case.model, "classification").fit(case.batches)
    assert la.n_data == 7
    assert set(la.coverage) == {name for name, _ in case.model.named_parameters()}
    assert set(la.coverage.values()) == {"kron", "dense", "diag"}
    assert la.prior_precision.numel() == len(la.curvature.blocks)
    assert isinstance(la.curvature, Curvature)
    assert la.sigma_noise.numel() == 1


def test_vector_of_precisions_follows_the_order_of_the_blocks():
    """One block for a layer with its bias under joint_bias=True, one for each tensor otherwise."""
    case = build("mlp-tanh")
    joint = Laplace(case.model, "classification").fit(case.batches)
    assert list(joint.curvature.blocks) == ["0.weight", "2.weight"]
    split = Laplace(case.model, "classification", joint_bias=False).fit(case.batches)
    assert list(split.curvature.blocks) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert split.prior_precision.numel() == 4


@pytest.mark.parametrize("likelihood", ["Categorical", "Gaussian", "Bernoulli"])
def test_likelihood_objects_mean_the_same_as_their_names(likelihood):
    name = {"Categorical": "mlp-tanh", "Gaussian": "mlp-regression", "Bernoulli": "mlp-binary"}
    case = build(name[likelihood])
    named = Laplace(case.model, case.likelihood).fit(case.batches)
    made = Laplace(case.model, getattr(kfac_laplace, likelihood)()).fit(case.batches)
    assert torch.equal(named.log_marginal_likelihood(), made.log_marginal_likelihood())


def test_every_error_derives_from_the_root():
    from kfac_laplace import errors

    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(raised) >= 5 and all(issubclass(e, KfacLaplaceError) for e in raised)
