"""Every keyword of `Laplace` beside a file is in effect after loading, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import build

from kfac_laplace import Laplace, MonteCarlo
from kfac_laplace.curvature.estimate.fisher import Exact
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Categorical, Gaussian
from kfac_laplace.posterior.sharing import Scalar, Sharing
from kfac_laplace.posterior.state import BINDING, CHOSEN

#: Set after loading.
AFTERWARDS = {"prior_precision": 9.0, "sigma_noise": 5.0, "temperature": 3.0}
#: Other values than the file's: refused.
REFUSED: dict[str, Any] = {
    "likelihood": "regression",
    "hessian_structure": "diag",
    "subset_of_weights": ["2.*"],
    "kfac_approx": {"0.*": "expand"},
    "fisher": MonteCarlo(2),
    "prior_structure": "scalar",
    "prior_mean": 1.0,
    "joint_bias": False,
    "uncovered": "freeze",
    "class_axis": 1,
}
#: The file's own values in other words.
ALIKE: dict[str, Any] = {
    "likelihood": Categorical(),
    "hessian_structure": "kron",
    "subset_of_weights": "all",
    "kfac_approx": "auto",
    "fisher": Exact(),
    "prior_structure": "layerwise",
    "prior_mean": 0.0,
    "joint_bias": True,
    "uncovered": "diag",
    "class_axis": None,
}
#: In effect: a value, and where it shows.
APPLIED: dict[str, tuple[Any, Callable[[Laplace], Any]]] = {
    "seed": (3, lambda la: la.seed),
    "factor_dtype": (torch.float32, lambda la: la.curvature.options.factor_dtype),
    "memory_budget": (2**20, lambda la: la.curvature.options.memory_budget),
    "offload": ("cpu", lambda la: la.options.offload),
    "process_group": ("world", lambda la: la.options.process_group),
    "forward_fn": (lambda model, x: 2 * model(x), lambda la: la.curvature.network.forward_fn),
    "batch_fn": (lambda batch: (batch[1], batch[0]), lambda la: la.options.batch_fn),
    "dict_key_y": ("target", lambda la: la.dict_key_y),
}
#: Other words for a value of `subset_of_weights`, not for a file.
SPELLINGS = {"subnetwork_indices", "subnetwork_mask"}
KEYWORDS = inspect.signature(Laplace).parameters.keys() - {"model"} - SPELLINGS


@pytest.fixture
def saved(tmp_path):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    la.save(tmp_path / "la.pt")
    return tmp_path / "la.pt", la, case


def test_the_tables_have_every_keyword():
    """An option more has to say which of them it is."""
    assert {*AFTERWARDS} | {*BINDING} | {*CHOSEN} >= KEYWORDS
    assert {*BINDING}.isdisjoint(CHOSEN)
    known = {*AFTERWARDS, *REFUSED, *APPLIED}
    assert known == {*ALIKE, *AFTERWARDS, *APPLIED} == KEYWORDS


@pytest.mark.parametrize("name", AFTERWARDS)
def test_hyperparameters_are_set_afterwards(name, saved):
    path, _, case = saved
    with pytest.raises(InvalidValue, match=rf"{name}.*holds this already.*la\.{name} = value"):
        Laplace.load(path, case.model, **{name: AFTERWARDS[name]})


@pytest.mark.parametrize("name", REFUSED)
def test_what_binds_the_numbers_is_the_files(name, saved):
    path, _, case = saved
    with pytest.raises(InvalidValue, match=rf"{name}: .*stored.*here.*Leave it out"):
        Laplace.load(path, case.model, **{name: REFUSED[name]})


@pytest.mark.parametrize("name", ALIKE)
def test_saying_what_the_file_says_does_no_harm(name, saved):
    path, la, case = saved
    again = Laplace.load(path, case.model, **{name: ALIKE[name]})
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("name", APPLIED)
def test_what_binds_nothing_is_in_effect(name, saved):
    path, la, case = saved
    value, shown = APPLIED[name]
    again = Laplace.load(path, case.model, **{name: value})
    assert shown(again) == value != shown(Laplace.load(path, case.model))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


def test_what_the_chosen_ones_do(saved):
    path, la, case = saved
    doubled = Laplace.load(path, case.model, forward_fn=APPLIED["forward_fn"][0])
    assert not torch.equal(doubled(case.x), la(case.x))
    draws = [Laplace.load(path, case.model, seed=s).sample(2) for s in (0, 0, 3)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    turned = Laplace.load(path, case.model, batch_fn=APPLIED["batch_fn"][0])
    turned.fit([(y, x) for x, y in case.batches])
    named = Laplace.load(path, case.model, dict_key_y="target")
    named.fit([{"input": x, "target": y} for x, y in case.batches])
    for again in (turned, named):
        assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize(
    ("name", "meant"), [("sead", "seed"), ("prior_precison", "prior_precision"), ("model_", "")]
)
def test_unknown_keywords_are_named_with_what_may_be_meant(name, meant, saved):
    path, _, case = saved
    with pytest.raises(InvalidType, match=f"{name}.*{'Perhaps ' + meant if meant else 'Choose'}"):
        Laplace.load(path, case.model, **{name: 3})


# --- objects of one's own ------------------------------------------------------------------------


class Weighted(Gaussian):
    """A likelihood with a tensor among its options."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.as_tensor(weights)

    def options(self):
        return {"weights": self.weights}


@dataclass(frozen=True)
class OwnFisher:
    """Exact, by another name."""

    def vectors(self, likelihood, f, y, generator):
        return Exact().vectors(likelihood, f, y, generator)


class OtherFisher(OwnFisher):
    """Another one."""


class Own(Sharing):
    """One precision for all."""

    @property
    def constant_on_blocks(self):
        return True

    def index(self, layouts):
        return Scalar().index(layouts)


OBJECTS = {
    "likelihood": (lambda: Weighted([1.0, 2.0]), lambda: Weighted([1.0, 3.0])),
    "fisher": (OwnFisher, OtherFisher),
    "prior_structure": (Own, lambda: "layerwise"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_of_ones_own_are_passed_again(name, tmp_path):
    case = build("mlp-regression")
    make, other = OBJECTS[name]
    options = {"likelihood": "regression", name: make()}
    la = Laplace(case.model, **options).fit(case.batches)
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", case.model, **{name: make()})
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    with pytest.raises(InvalidValue, match=rf"{name}.*Laplace\.load\(path, model, {name}=\.\.\.\)"):
        Laplace.load(tmp_path / "la.pt", case.model)
    with pytest.raises(InvalidValue):
        Laplace.load(tmp_path / "la.pt", case.model, **{name: other()})


def test_a_forward_function_is_passed_again(tmp_path):
    case = build("mlp-tanh")
    run = lambda model, x: model(x)  # noqa: E731  # as users write it
    la = Laplace(case.model, case.likelihood, forward_fn=run).fit(case.batches)
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", case.model, forward_fn=run)
    assert torch.equal(again(case.x), la(case.x))
    with pytest.raises(InvalidValue, match="forward_fn"):
        Laplace.load(tmp_path / "la.pt", case.model)


def test_options_that_hold_tensors_are_compared_by_value():
    """`==` of two dictionaries of tensors has no one answer."""
    case = build("mlp-regression")
    first, alike, other = (
        Laplace(case.model, Weighted(w)).fit(case.batches) for w in ([1, 2], [1, 2], [2, 1])
    )
    assert first.likelihood == alike.likelihood != other.likelihood
    assert first.options == alike.options != other.options
    assert first.curvature.copy().merge(alike.curvature).n_data == 14
    with pytest.raises(InvalidValue, match="likelihoods"):
        first.curvature.merge(other.curvature)
    first.load_state_dict(alike.state_dict())
    with pytest.raises(InvalidValue, match="likelihood"):
        first.load_state_dict(other.state_dict())


class Named(Laplace):
    """With an option of its own."""

    def __init__(self, model, likelihood="classification", *, name="none", **options):
        super().__init__(model, likelihood, **options)
        self.name = name


class Rescaled(Laplace):
    """Hands everything on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)


@pytest.mark.parametrize("kind", [Named, Rescaled])
def test_subclasses_take_the_options_that_they_hand_on(kind, tmp_path):
    """And what is none is answered by names that are."""
    case = build("mlp-tanh")
    kind(case.model, case.likelihood).fit(case.batches).save(tmp_path / "p.pt")
    la = kind.load(tmp_path / "p.pt", case.model, seed=3, dict_key_y="target")
    assert type(la) is kind and la.seed == 3 and la.dict_key_y == "target"
    with pytest.raises(InvalidType, match="Perhaps seed was meant"):
        kind.load(tmp_path / "p.pt", case.model, sed=3)
    with pytest.raises(InvalidType, match="Choose from") as caught:
        kind.load(tmp_path / "p.pt", case.model, zzz=3)
    for word in ("options", "args", "self", *AFTERWARDS):
        assert f"'{word}'" not in str(caught.value)


def test_options_of_a_subclass_itself(tmp_path):
    case = build("mlp-tanh")
    Named(case.model, case.likelihood, name="a").fit(case.batches).save(tmp_path / "p.pt")
    assert Named.load(tmp_path / "p.pt", case.model, name="b", seed=3).name == "b"
