"""Saving and loading: tensors and plain data, equal predictions, errors for the wrong model."""

import pytest
import torch
from cases import build
from posterior import dense

from kfac_laplace import KfacLaplaceError, Laplace

STRUCTURES = ("kron", "diag", "full", "lowrank")
OPTIONS = {
    "kron": {"prior_structure": "layerwise"},
    "diag": {"prior_structure": "diag"},
    "full": {"prior_structure": "scalar"},
    "lowrank": {"prior_structure": "unit"},
}
everywhere = pytest.mark.parametrize("structure", STRUCTURES)
NAMES = ("mlp-tanh", "mlp-regression", "mlp-binary", "vit", "tokens")


def tuned(name, structure):
    """A posterior whose every stored value is away from its default."""
    sigma = 0.6 if name == "mlp-regression" else 1.0
    la, case = dense.fit(
        name,
        hessian_structure=structure,
        prior_mean=0.1,
        temperature=0.8,
        sigma_noise=sigma,
        **OPTIONS[structure],
    )
    la.prior_precision = torch.linspace(0.5, 3, la.prior_precision.numel(), dtype=torch.float64)
    la.posterior_scale = 0.4
    return la, case


def assert_same(one, other, x):
    assert other.n_data == one.n_data and other.coverage == one.coverage
    for term in ("log_likelihood", "log_det_ratio", "scatter"):
        assert torch.equal(getattr(other, term).detach(), getattr(one, term).detach())
    assert torch.equal(
        other.log_marginal_likelihood().detach(), one.log_marginal_likelihood().detach()
    )
    assert float(other.posterior_scale) == float(one.posterior_scale)
    assert torch.equal(other.predict(x).covariance, one.predict(x).covariance)
    draws = [la.sample(3, generator=torch.Generator().manual_seed(1)) for la in (one, other)]
    torch.testing.assert_close(*draws, rtol=1e-12, atol=1e-12)


@everywhere
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_a_file(name, structure, tmp_path):
    la, case = tuned(name, structure)
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", build(name).model)
    assert_same(la, loaded, case.x)


@everywhere
def test_the_file_is_plain_data(structure, tmp_path):
    """`weights_only=True` refuses anything but tensors and plain containers."""
    la, _ = tuned("vit", structure)
    la.save(tmp_path / "posterior.pt")
    content = torch.load(tmp_path / "posterior.pt", weights_only=True)
    assert isinstance(content, dict)
    torch.save(la.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


@everywhere
def test_state_dict_into_a_fresh_posterior(structure):
    la, case = tuned("mlp-tanh", structure)
    fresh = Laplace(
        build("mlp-tanh").model,
        "classification",
        hessian_structure=structure,
        prior_mean=0.1,
        temperature=0.8,
        **OPTIONS[structure],
    )
    fresh.load_state_dict(la.state_dict())
    assert_same(la, fresh, case.x)


@everywhere
def test_a_loaded_posterior_takes_more_data(structure, tmp_path):
    """Continual fitting across processes."""
    name = "mlp-tanh"
    case = build(name)
    options = {"hessian_structure": structure}
    half = Laplace(case.model, case.likelihood, **options).fit(case.batches[:1])
    half.save(tmp_path / "half.pt")
    loaded = Laplace.load(tmp_path / "half.pt", case.model)
    loaded.fit(case.batches[1:], override=False)
    whole = Laplace(case.model, case.likelihood, **options).fit(case.batches)
    torch.testing.assert_close(
        loaded.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=1e-10, atol=1e-9
    )


@everywhere
def test_the_state_is_a_snapshot(structure):
    la, case = tuned("mlp-tanh", structure)
    state = la.state_dict()
    expected = la.log_marginal_likelihood().detach()
    la.fit(case.batches[:1])
    la.prior_precision = torch.full_like(la.prior_precision.detach(), 7.0)
    la.load_state_dict(state)
    assert torch.equal(la.log_marginal_likelihood().detach(), expected)


@everywhere
@pytest.mark.parametrize("other", ["mlp-relu-inplace", "cnn", "frozen-bias"])
def test_a_model_that_does_not_fit_is_refused(structure, other, tmp_path):
    """Other shapes (4 classes), other names, another set of trainable parameters."""
    la, _ = tuned("mlp-tanh", structure)
    la.save(tmp_path / "posterior.pt")
    with pytest.raises(KfacLaplaceError):
        Laplace.load(tmp_path / "posterior.pt", build(other).model)


def test_weights_other_than_those_of_the_fit_are_refused(tmp_path):
    """The curvature belongs to one set of weights; a silently moved mode would be wrong."""
    la, case = tuned("mlp-tanh", "kron")
    la.save(tmp_path / "posterior.pt")
    with torch.no_grad():
        case.model[0].weight[0, 0] += 1e-3
    with pytest.raises(KfacLaplaceError, match="0.weight"):
        Laplace.load(tmp_path / "posterior.pt", case.model)


def test_a_state_of_another_structure_is_refused_and_changes_nothing():
    kron, case = tuned("mlp-tanh", "kron")
    diag, _ = tuned("mlp-tanh", "diag")
    before = kron.log_marginal_likelihood().detach()
    with pytest.raises(KfacLaplaceError):
        kron.load_state_dict(diag.state_dict())
    assert torch.equal(kron.log_marginal_likelihood().detach(), before)
    assert kron(case.x).shape == (7, 3)


def test_nonsense_is_refused_and_changes_nothing(tmp_path):
    la, _ = tuned("mlp-tanh", "kron")
    before = la.log_marginal_likelihood().detach()
    with pytest.raises(KfacLaplaceError):
        la.load_state_dict({"weight": torch.zeros(2)})
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(KfacLaplaceError):
        Laplace.load(tmp_path / "other.pt", build("mlp-tanh").model)
    assert torch.equal(la.log_marginal_likelihood().detach(), before)


def test_an_unfitted_posterior_has_nothing_to_save(tmp_path):
    la = Laplace(build("mlp-tanh").model, "classification")
    with pytest.raises(KfacLaplaceError, match="fit"):
        la.save(tmp_path / "posterior.pt")
    assert not (tmp_path / "posterior.pt").exists()


def without(key):
    return lambda state: state["hyperparameters"].pop(key)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["hyperparameters"].update(prior_precision=torch.ones(5).double()),
        lambda s: s["hyperparameters"].update(prior_precision=-torch.ones(2).double()),
        without("temperature"),
        lambda s: s["mode"].pop("0.bias"),
        lambda s: s.update(curvature={}),
        lambda s: s.update(posterior_scale=torch.tensor(-1.0)),
        lambda s: s.update(format=s["format"] + 1),
    ],
    ids=["length", "sign", "missing value", "missing mode", "curvature", "scale", "format"],
)
def test_tampered_states(change):
    """A file cut short or edited by hand is refused before anything of it is taken over."""
    la, case = tuned("mlp-tanh", "kron")
    other, _ = tuned("mlp-tanh", "kron")
    other.prior_precision = torch.tensor([5.0, 6.0])
    state = other.state_dict()
    state |= {name: dict(state[name]) for name in ("hyperparameters", "mode")}
    change(state)
    before = [la.log_marginal_likelihood().detach(), la.posterior_scale, la(case.x)]
    with pytest.raises(KfacLaplaceError):
        la.load_state_dict(state)
    after = [la.log_marginal_likelihood().detach(), la.posterior_scale, la(case.x)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
