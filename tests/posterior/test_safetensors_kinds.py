"""Posteriors in .safetensors files: every kind comes back bit by bit."""

from __future__ import annotations

import pytest
import torch
from cases import build
from posterior import dense
from posterior.small_fits import calibrated, drawn, fit, narrow, net, tuned, with_buffers
from posterior.toy_sharing import ByKind
from torch import nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, MonteCarlo
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import NAMED
from kfac_laplace.optim import KFAC
from kfac_laplace.states import files
from kfac_laplace.states.plain import same

pytest.importorskip("safetensors")


def likelihoods(name):
    return fit(net(), name, **({"sigma_noise": 0.6} if NAMED[name]().has_noise else {}))


def rewards():
    torch.manual_seed(0)
    pairs = nn.Sequential(nn.Linear(4, 1), nn.Flatten()).double()  # (n, 2, 4) to (n, 2)
    x, y = torch.randn(20, 2, 4, dtype=torch.float64), torch.randint(0, 2, (20,))
    return Laplace(pairs, "reward_modeling", hessian_structure="diag").fit([(x, y)])


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return fit(model)


def frozen():
    model = net()
    model[0].bias.requires_grad_(False)
    return fit(model)


def structures(name, structure):
    shared = {"kron": "layerwise", "diag": "diag", "full": "unit", "lowrank": "unit"}[structure]
    la, case = dense.fit(name, hessian_structure=structure, prior_structure=shared, prior_mean=0.1)
    la.prior_precision = torch.linspace(0.5, 3, la.prior_precision.numel(), dtype=torch.float64)
    return la


KINDS = {
    **{
        f"{name} {structure}": lambda name=name, structure=structure: structures(name, structure)
        for name in ("mlp-tanh", "mlp-regression", "mlp-binary", "cnn", "vit", "tokens", "twice")
        for structure in ("kron", "diag", "full", "lowrank")
    },
    **{name: lambda name=name: likelihoods(name) for name in NAMED if name != "reward_modeling"},
    "reward_modeling": rewards,  # of pairs
    **{f"tuned {s}": lambda s=s: tuned(s, prior_structure="scalar") for s in ("kron", "full")},
    **{
        f"prior {structure}": lambda structure=structure: fit(
            net(), hessian_structure="diag", prior_structure=structure
        )
        for structure in ("scalar", "unit", "input", "diag")
    },
    "patterns of priors": lambda: fit(
        net(),
        hessian_structure="diag",
        prior_structure={"0.*": "unit", "*": "scalar"},
        prior_precision={"0.*": 2.0, "*": 0.5},
        prior_mean={"2.bias": 1.0, "*": 0.0},
    ),
    "last layer": lambda: fit(net(), subset_of_weights="last_layer"),
    "some layers": lambda: fit(net(), subset_of_weights=["0.*"]),
    "separate biases": lambda: fit(net(), joint_bias=False, seed=3),
    "drawn labels": lambda: fit(net(), fisher=MonteCarlo(3)),
    "calibrated": calibrated,
    "tied": tied,
    "buffers": with_buffers,
    "frozen": frozen,
    "half": lambda: narrow(torch.bfloat16),
    "single": lambda: narrow(torch.float32),
    "sums in single": lambda: fit(net().float(), x=drawn(9, 4).float(), factor_dtype=torch.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(kind, tmp_path):
    """The same state bit by bit, and so the same evidence, predictions and samples."""
    la = KINDS[kind]()
    la.save(tmp_path / "la.safetensors")
    again = Laplace.load(tmp_path / "la.safetensors", la.model)
    assert same(again.state_dict(), la.state_dict())
    assert torch.equal(
        again.log_marginal_likelihood().detach(), la.log_marginal_likelihood().detach()
    )
    for name in ("prior_precision", "sigma_noise", "posterior_scale", "predictive_temperature"):
        assert torch.equal(getattr(again, name), getattr(la, name))
    draws = [one.sample(3, generator=torch.Generator().manual_seed(1)) for one in (la, again)]
    # Bases are made anew from the same factors; LAPACK's threads may round otherwise.
    torch.testing.assert_close(*draws, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "tokens-regression"])
def test_predictions_come_back(name, structure, tmp_path):
    la, case = dense.fit(name, hessian_structure=structure)
    la.save(tmp_path / "la.safetensors")
    again = Laplace.load(tmp_path / "la.safetensors", build(name).model)
    one, other = la.predict(case.x), again.predict(case.x)
    assert torch.equal(one.mean, other.mean) and torch.equal(one.covariance, other.covariance)


def test_objects_of_a_users_own_are_passed_again(tmp_path):
    la = fit(net(), prior_structure=ByKind())
    la.save(tmp_path / "la.safetensors")
    with pytest.raises(InvalidValue, match=r"prior_structure: an object of your own.*Pass it"):
        Laplace.load(tmp_path / "la.safetensors", la.model)
    again = Laplace.load(tmp_path / "la.safetensors", la.model, prior_structure=ByKind())
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


def test_more_data_are_added_after_loading(tmp_path):
    x, y = drawn(9, 4), torch.arange(9) % 2
    model = net()
    Laplace(model).fit([(x[:5], y[:5])]).save(tmp_path / "half.safetensors")
    loaded = Laplace.load(tmp_path / "half.safetensors", model)
    loaded.fit([(x[5:], y[5:])], override=False)
    whole = Laplace(model).fit([(x, y)])
    torch.testing.assert_close(loaded.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_curvature_alone_and_tuners_go_into_such_files(tmp_path):
    """One mapping for all states of the library."""
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    tuner = MarglikTuner(case.model, case.likelihood, n_data=7)
    tuner.loss(case.model(case.x), case.y)
    tuner.step(case.batches)
    for state in (curvature.state_dict(), tuner.state_dict()):
        files.write(state, tmp_path / "state.safetensors")
        assert same(files.read(tmp_path / "state.safetensors"), state)
    again = MarglikTuner(case.model, case.likelihood, n_data=7)
    again.load_state_dict(files.read(tmp_path / "state.safetensors"))
    assert same(again.state_dict(), tuner.state_dict())


def test_an_optimisers_state_goes_into_such_files(tmp_path):
    """With keys that are numbers, as torch's optimisers have them."""
    model = net()
    optimizer = KFAC(model, "regression")
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(drawn(9, 4)), drawn(9, 2, seed=1)).backward()
        optimizer.step()
    state = optimizer.state_dict()
    files.write(state, tmp_path / "state.safetensors")
    again = files.read(tmp_path / "state.safetensors")
    assert same(again, state)
    optimizer.load_state_dict(again)
    assert same(optimizer.state_dict(), state)
