"""The curvature's options: one object behind every signature, as plain data and back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import numpy
import pytest
import torch
import torch.distributed as dist
from cases import build

from kfac_laplace import Curvature, Hybrid, Laplace, MarglikTuner, MonteCarlo, marglik_training
from kfac_laplace.curvature.options import GIVEN, OF_A_RUN, CurvatureKeywords, CurvatureOptions
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods import Categorical, Gaussian

NAMES = [field.name for field in fields(CurvatureOptions) if field.name != "likelihood"]
DEFAULTS = CurvatureOptions.of("classification")
# Another value for each option; none is its default.
OTHERS = {
    "kfac_approx": {"0.*": "expand"},
    "fisher": MonteCarlo(2),
    "hessian_structure": "diag",
    "subset_of_weights": ["2.*"],
    "joint_bias": False,
    "uncovered": "freeze",
    "seed": 3,
    "factor_dtype": torch.float64,
    "class_axis": 1,
    "forward_fn": lambda model, x: model(x),
    "batch_fn": lambda batch: (batch[0], batch[1]),
    "memory_budget": 2**20,
    "offload": "cpu",
    "process_group": "world",
}


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_option_has_another_value_here():
    assert set(OTHERS) == set(NAMES)
    assert all(OTHERS[name] != getattr(DEFAULTS, name) for name in NAMES)


@pytest.mark.parametrize(
    "function", [Curvature, Laplace, MarglikTuner, marglik_training], ids=lambda f: f.__name__
)
def test_every_signature_spells_every_option_with_its_default(function):
    """An option that is left out of one signature cannot be passed there."""
    shown = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    expected = {name: getattr(DEFAULTS, name) for name in NAMES} | {"fisher": "exact"}
    assert {name: shown.get(name, "missing") for name in NAMES} == expected


def test_the_typed_keywords_are_the_fields():
    """But for the structure, which `marglik_training` takes by position."""
    assert set(CurvatureKeywords.__annotations__) == set(NAMES) - {"hessian_structure"}


@pytest.mark.parametrize("name", NAMES)
def test_options_reach_the_curvature_from_everywhere(name, one_rank):
    case, given = build("mlp-tanh"), {name: OTHERS[name]}
    laplace = Laplace(case.model, "classification", **given)
    tuner = MarglikTuner(case.model, "classification", 7, **given)
    expected = CurvatureOptions.of("classification", **given)
    for options in (
        Curvature(case.model, "classification", **given).options,
        laplace.options,
        laplace.curvature.options,
        tuner.options,
        tuner.laplace(case.batches).options,
        marglik_training(case.model, case.batches, n_epochs=1, **given)[0].options,
    ):
        assert replace(options, likelihood=expected.likelihood) == expected
        assert isinstance(options.likelihood, Categorical)


@pytest.mark.parametrize("name", NAMES)
def test_plain_data_make_the_same_options_again(name):
    options = replace(DEFAULTS, **{name: OTHERS[name]})
    plain = options.to_plain()
    if name in OF_A_RUN:
        assert name not in plain
    if plain.get(name) == GIVEN:  # a function: the file says that there was one
        with pytest.raises(InvalidValue, match=name):
            CurvatureOptions.from_plain(plain, {})
        keywords = CurvatureOptions.from_plain(plain, {name: OTHERS[name]})
    else:
        keywords = CurvatureOptions.from_plain(plain, {})
    again = CurvatureOptions.of(keywords.pop("likelihood"), **keywords)
    expected = replace(options, **{name: getattr(DEFAULTS, name) for name in OF_A_RUN})
    assert replace(again, likelihood=options.likelihood) == expected


def test_plain_data_hold_options_of_likelihood_and_estimator():
    options = CurvatureOptions.of(Categorical(label_smoothing=0.1), fisher=Hybrid(passes=3))
    keywords = CurvatureOptions.from_plain(options.to_plain(), {})
    assert keywords["fisher"] == Hybrid(passes=3)
    assert keywords["likelihood"].options() == options.likelihood.options()


def test_objects_of_ones_own_have_to_be_passed_again():
    class Own(Gaussian):
        pass

    plain = CurvatureOptions.of(Own()).to_plain()
    assert plain["likelihood"] is None
    with pytest.raises(InvalidValue, match="likelihood"):
        CurvatureOptions.from_plain(plain, {})
    assert isinstance(CurvatureOptions.from_plain(plain, {"likelihood": Own()})["likelihood"], Own)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hessian_structure", "kfac", InvalidValue),
        ("uncovered", "drop", InvalidValue),
        ("kfac_approx", "sum", InvalidValue),
        ("kfac_approx", 3, InvalidType),
        ("seed", 0.5, InvalidType),
        ("factor_dtype", torch.float16, InvalidValue),
        ("fisher", "ggn", InvalidValue),
        ("fisher", 3, InvalidType),
    ],
)
def test_options_check_themselves(name, value, error):
    with pytest.raises(error, match=name):
        CurvatureOptions.of("classification", **{name: value})


def test_options_are_frozen():
    with pytest.raises(AttributeError):
        DEFAULTS.seed = 1  # type: ignore[misc]


@dataclass(frozen=True)
class WithToy(CurvatureOptions):
    """An option more: a field with its check is all that it takes."""

    toy: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.toy < 1:
            raise InvalidValue("must be at least 1", where="toy", got=self.toy)


def test_an_option_more_is_one_field():
    case = build("mlp-tanh")
    options = WithToy.of("classification", toy=2)
    curvature = Curvature.of(case.model, options).fit(case.batches)
    assert curvature.ggn.options.toy == 2
    assert WithToy.from_plain(options.to_plain(), {})["toy"] == 2
    assert options.keywords()["toy"] == 2 and options != WithToy.of(options.likelihood)
    with pytest.raises(InvalidValue, match="toy"):
        WithToy.of("classification", toy=0)


@pytest.mark.parametrize(
    ("function", "name", "meant"),
    [
        (lambda model, **o: MarglikTuner(model, "classification", 7, **o), "kfac_aprox", "kfac_"),
        (lambda model, **o: marglik_training(model, [], **o), "prior_precision", "prior_prec_init"),
    ],
    ids=["tuner", "training"],
)
def test_a_wrong_keyword_is_named_with_what_may_be_meant(function, name, meant):
    with pytest.raises(TypeError, match=f"{name}.*Perhaps {meant}"):
        function(build("mlp-tanh").model, **{name: 1.0})


def test_names_stand_for_objects_however_options_are_made():
    direct = CurvatureOptions("classification", fisher="mc")
    assert direct == CurvatureOptions.of("classification", fisher=MonteCarlo())
    assert isinstance(direct.likelihood, Categorical)
    assert direct != CurvatureOptions(Categorical(label_smoothing=0.1), fisher="mc")


def test_what_callers_change_later_does_not_reach_the_options():
    given, subset = {"*": "expand"}, ["2.*"]
    options = CurvatureOptions.of("classification", kfac_approx=given, subset_of_weights=subset)
    given["*"] = "reduce"
    subset.append("0.*")
    assert options.kfac_approx == {"*": "expand"} and options.subset_of_weights == ["2.*"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", numpy.int64(2)),
        ("memory_budget", numpy.int64(10**6)),
        ("joint_bias", numpy.bool_(False)),
        ("kfac_approx", MappingProxyType({"*": "expand"})),
    ],
)
def test_numbers_of_numpy_and_other_mappings_are_plain(name, value, tmp_path):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, **{name: value}).fit(case.batches)
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", case.model)
    assert again.options == la.options
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("joint_bias", "no", InvalidType),
        ("forward_fn", 3, InvalidType),
        ("batch_fn", "pairs", InvalidType),
        ("seed", 2**70, InvalidValue),
        ("memory_budget", 0, InvalidValue),
    ],
)
def test_options_of_a_wrong_kind(name, value, error):
    with pytest.raises(error, match=name):
        Laplace(build("mlp-tanh").model, "classification", **{name: value})
