"""Arguments of the wrong kind are told by name, and layers without width are no trouble."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import build
from laws import EXACT, fitted, relative_error, seeded_case
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue


@pytest.fixture
def la() -> Laplace:
    case = build("mlp-tanh")
    return Laplace(case.model, "classification").fit(case.batches)


ASKS = {
    "call": lambda la, x, g: la(x, generator=g),
    "mc": lambda la, x, g: la(x, link_approx="mc", generator=g),
    "linear": lambda la, x, g: la(x, pred_type="linear", n_samples=2, generator=g),
    "nn": lambda la, x, g: la(x, pred_type="nn", n_samples=2, generator=g),
    "predict": lambda la, x, g: la.predict(x, generator=g),
    "sample": lambda la, x, g: la.sample(2, generator=g),
    "functions": lambda la, x, g: la.functional_samples(x, 2, generator=g),
    "targets": lambda la, x, g: la.predictive_samples(x, 2, generator=g),
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("generator", [5, 0, True, "seed", torch.Generator, torch.tensor(3)])
def test_a_generator_is_one(la, ask, generator):
    with pytest.raises(InvalidType, match=r"^generator: neither.*got.*manual_seed"):
        ASKS[ask](la, build("mlp-tanh").x, generator)


KAPPAS = {
    "nan": (math.nan, InvalidValue, "finite.*got nan"),
    "inf": (math.inf, InvalidValue, "finite.*got inf"),
    "negative": (-1, InvalidValue, r"below zero.*got -1\.0.*≥ 0"),
    "tensor": (torch.tensor(-0.5), InvalidValue, r"below zero.*got -0\.5"),
    "two": (torch.ones(2), InvalidValue, r"one number.*got shape \(2,\)"),
    "none at all": (torch.ones(0), InvalidValue, r"one number.*got shape \(0,\)"),
    "a word": ("a", InvalidType, "got 'a'.*Pass a real number"),
    "nothing": (None, InvalidType, "got None.*Pass a real number"),
    "complex": (torch.tensor(1j), InvalidType, "Pass a real number"),
}


@pytest.mark.parametrize("kind", KAPPAS)
def test_kappa_says_what_it_may_be(la, kind):
    value, error, words = KAPPAS[kind]
    with pytest.raises(error, match=f"^posterior_scale: .*{words}"):
        la.posterior_scale = value
    assert la.posterior_scale == 1
    for good in (0, 2.5, torch.tensor([3.0])):
        la.posterior_scale = good
        assert la.posterior_scale.shape == () and float(la.posterior_scale) == float(good)


EPOCHS = [(-3, InvalidValue), (2.0, InvalidType), ("two", InvalidType), (True, InvalidType)]


@pytest.mark.parametrize(("value", "error"), EPOCHS)
@pytest.mark.parametrize("name", ["n_epochs_burnin", "marglik_frequency", "n_hypersteps"])
def test_the_tuners_counts_are_whole_numbers(name, value, error):
    case = build("mlp-tanh")
    for make in (
        lambda **o: MarglikTuner(case.model, "classification", 7, **o),
        lambda **o: marglik_training(case.model, case.batches, n_epochs=1, **o),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            make(**{name: value})


@pytest.mark.parametrize(("value", "error"), EPOCHS)
def test_epochs_are_whole_numbers(value, error):
    case = build("mlp-tanh")
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    with pytest.raises(error, match="^n_epochs: "):
        marglik_training(case.model, case.batches, n_epochs=value)
    tuner = MarglikTuner(case.model, "classification", 7)
    for loader in (None, case.batches):
        with pytest.raises(error, match="^epoch: "):
            tuner.step(loader, epoch=value)
    assert not tuner.history and tuner.step(case.batches).epoch == 1
    assert all(torch.equal(before[name], p) for name, p in case.model.named_parameters())


MISSPELT = {"fishr": "fisher", "prior_prec": "prior_precision", "subset_of_weight": "subset_of_w"}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_keyword_that_is_none_suggests_the_right_one(name):
    model = build("mlp-tanh").model
    entries = [
        lambda **o: Laplace(model, "classification", **o),
        lambda **o: MarglikTuner(model, "classification", 7, **o),
    ]
    if name != "prior_prec":
        entries.append(lambda **o: Curvature(model, "classification", **o))
    for make in entries:
        with pytest.raises(InvalidType, match=f"no such keyword.*'{name}'.*{MISSPELT[name]}"):
            make(**{name: 1})
    for make in entries:
        with pytest.raises(InvalidType, match=r"'zzz'.*Choose from \['model', "):
            make(zzz=1)


def test_a_value_too_many_says_which_keyword_it_may_be():
    """laplace-torch takes the subset and the structure by position."""
    model = build("mlp-tanh").model
    for make, positions in (
        (lambda *v: Laplace(model, *v), 2),
        (lambda *v: Curvature(model, *v), 2),
        (lambda *v: MarglikTuner(model, *v), 3),
    ):
        given = ("classification", 7, "kron", "all")[:positions]
        with pytest.raises(
            InvalidType,
            match=rf"takes {positions} values by position, model.*Write the rest by name",
        ):
            make(*given)


class Beside(nn.Module):
    """A head, and beside it what a layer without width adds."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        z = x[:, : first.in_features] if isinstance(first, nn.Linear) else x.long().clamp(0, 4)
        for layer in self.layers:
            z = layer(z)
        return self.head(x) + z.flatten(1).sum(1, keepdim=True) * z.new_tensor([1.0, -1.0])


EMPTY = {
    "nothing in": lambda: Beside(nn.Linear(0, 3)),
    "nothing in, no bias": lambda: Beside(nn.Linear(0, 3, bias=False), nn.Linear(3, 2)),
    "nothing out": lambda: Beside(nn.Linear(3, 0)),
    "nothing out, no bias": lambda: Beside(nn.Linear(3, 0, bias=False)),
    "nothing between": lambda: Beside(nn.Linear(3, 0), nn.Tanh(), nn.Linear(0, 2)),
    "a norm of nothing": lambda: Beside(nn.Linear(3, 0), nn.LayerNorm(0)),
    "a table of nothing": lambda: Beside(nn.Embedding(5, 0)),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", EMPTY)
def test_layers_without_width_go_through_everything(name, structure):
    """Parameters without entries are no part of the posterior; the others are exact."""
    example = seeded_case(EMPTY[name])
    model, x = example.model, example.x
    curvature = fitted(example, hessian_structure=structure)
    for key, parameter in model.named_parameters():
        assert (curvature.coverage[key] == "frozen") == (parameter.numel() == 0)
    for block in curvature.blocks.values():
        if block.kind != "kron":
            exact = oracles.ggn(model, *example.data, list(block.params))
            exact = exact.diagonal().diag() if block.kind == "diag" else exact
            assert relative_error(block.dense(), exact) < EXACT, block.params
    la = Laplace(model, hessian_structure=structure).fit(example.batches)
    assert la.sample(2).shape == (2, sum(p.numel() for p in model.parameters()))
    for pred_type in ("glm", "linear", "nn"):
        assert bool(torch.isfinite(la(x, pred_type=pred_type, n_samples=3)).all())
    la.calibrate()
    tuner = MarglikTuner(model, "classification", len(x), hessian_structure=structure)
    tuner.loss(*tuner.forward(example.batches[0])).backward()
    tuner.step(example.batches)
    assert math.isfinite(tuner.history[0].evidence)
