"""States and files that are damaged, changed or another version's: refused, and nothing changed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from cases import build
from mutants import GONE, mutants, with_value

from kfac_laplace import Curvature, Laplace
from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.states.plain import same, sealed
from kfac_laplace.states.stored import FORMAT

CASES = [("mlp-tanh", "kron"), ("mlp-regression", "diag"), ("mlp-binary", "full"), ("cnn", "kron")]


def fitted(name="mlp-tanh", structure="kron", **options):
    case = build(name)
    la = Laplace(case.model, case.likelihood, hessian_structure=structure, **options)
    return la.fit(case.batches), case


def resealed(state):
    """As another program might have written it, with every checksum right."""
    if isinstance(state.get("curvature"), dict):
        state = {**state, "curvature": sealed(state["curvature"])}
    return sealed(state)


def answers(la, x):
    predictive = la.predict(x)
    return [
        la.log_marginal_likelihood().detach(),
        la.posterior_scale,
        predictive.mean,
        predictive.covariance,
        la.sample(2, generator=torch.Generator().manual_seed(0)),
        la.n_data,
        la.curvature.settings,
    ]


@pytest.mark.parametrize("entry", ["state", "file"])
@pytest.mark.parametrize(("name", "structure"), CASES)
def test_any_changed_value_is_refused_or_changes_nothing(name, structure, entry):
    """Some of all changes, others for each case; [3, 3] turned is none, and may be loaded."""
    la, case = fitted(name, structure)
    state, expected = la.state_dict(), answers(la, case.x)
    reader, _ = fitted(name, structure)
    before = answers(reader, case.x)
    refused = 0
    for path, value, state_of_it in mutants(state, every=61 + CASES.index((name, structure))):
        try:
            if entry == "state":
                reader.load_state_dict(state_of_it)
                loaded = reader
            else:
                file = io.BytesIO()
                torch.save(state_of_it, file)
                file.seek(0)
                loaded = Laplace.load(file, case.model)
        except InvalidValue:
            refused += 1
        else:
            assert same(answers(loaded, case.x), expected), (path, value)
    assert refused > 25
    assert same(answers(reader, case.x), before)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "structure"), CASES)
def test_more_changes_of_a_file(name, structure):
    la, case = fitted(name, structure)
    expected = answers(la, case.x)
    for path, value, changed in mutants(la.state_dict(), every=4):
        file = io.BytesIO()
        torch.save(changed, file)
        file.seek(0)
        try:
            loaded = Laplace.load(file, case.model)
        except InvalidValue:
            continue
        assert same(answers(loaded, case.x), expected), (path, value)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "structure"), CASES)
def test_with_a_right_checksum_nothing_raw_comes_either(name, structure):
    """What a checksum would have refused anyhow: the checks of each value by themselves."""
    la, case = fitted(name, structure)
    refused = 0
    for _, _, changed in mutants(la.state_dict(), every=13 + CASES.index((name, structure))):
        try:
            Laplace(case.model, case.likelihood, hessian_structure=structure).load_state_dict(
                resealed(changed)
            )
        except KfacLaplaceError:
            refused += 1
    assert refused > 25


@pytest.mark.parametrize(("name", "structure"), CASES)
def test_a_curvatures_state(name, structure):
    la, case = fitted(name, structure)
    curvature = la.curvature
    refused = 0
    for path, value, changed in mutants(curvature.state_dict(), every=11):
        try:
            again = Curvature.from_state(changed, case.model, curvature.options)
        except InvalidValue:
            refused += 1
        else:
            for block, other in zip(curvature.blocks.values(), again.blocks.values(), strict=True):
                assert torch.equal(block.dense(), other.dense()), (path, value)
            assert again.n_data == curvature.n_data and same(again.settings, curvature.settings)
    assert refused > 25


GGN = ("curvature", "ggn")
BLOCK = (*GGN, "blocks", "0.weight")
GROUP = (*GGN, "groups", 0)
ZEROS = torch.zeros
#: Place, value, and what the message says; with checksums that are right.
TABLE = [
    (("options",), GONE, "an entry is missing. got no options"),
    (("more",), 1, "an entry is unknown"),
    (("options", "more"), 1, r"state\.options: an entry is unknown. got 'more'"),
    (("options", "uncovered"), GONE, r"state\.options: an entry is missing. got no uncovered"),
    (("options", "hessian_structure"), "magic", "hessian_structure"),
    (("options", "prior_structure"), "layers", "prior_structure"),
    (("mode", "0.weight"), GONE, r"state\.mode: an entry is missing"),
    (("mode", "0.weight"), ZEROS(2, 2), r"state\.mode\.0\.weight: shape \(5, 4\) is needed"),
    (("hyperparameters", "prior_precision"), -torch.ones(2), "prior_precision: must be positive"),
    (("hyperparameters", "prior_precision"), torch.ones(5), "has 2 precisions"),
    (("hyperparameters", "sigma_noise"), torch.tensor(2.0), "has no such hyperparameter"),
    (("hyperparameters", "temperature"), torch.ones(3), r"shape \(\) is needed"),
    (("posterior_scale",), torch.tensor(-0.5), "posterior_scale: must be ≥ 0"),
    (("sharing",), "other", "another sharing of precisions"),
    ((*GGN, "n_data"), -7, r"n_data: a count is a finite number ≥ 0. got -7"),
    ((*GGN, "n_data"), float("inf"), "n_data: a count is a finite number"),
    ((*GGN, "n_outputs"), float("nan"), "n_outputs: a count is a finite number"),
    ((*GGN, "n_rows"), "7", "n_rows: not a number"),
    ((*GGN, "class_axis"), 0, "class_axis: axis 0 runs over"),
    ((*GGN, "settings", "0.weight"), "half", "none of 'expand', 'reduce'"),
    ((*GGN, "tracked"), ["0.weight"], "not the trainable parameters"),
    ((*GGN, "statistic"), torch.tensor(float("nan")), "statistic: not finite"),
    ((*GGN, "kinds", "0.weight"), "dense", "none of 'kron'"),
    (BLOCK, GONE, r"blocks: an entry is missing. got no 0\.weight"),
    (
        (*BLOCK, "input_sum"),
        ZEROS(1, 3, 3),
        r"input_sum: shape \(1, 5, 3\) is needed. got \(1, 3, 3\)",
    ),
    ((*BLOCK, "output_rows"), ZEROS(1, 2, 7), r"output_rows: shape \(1, 2, 5\) is needed"),
    ((*BLOCK, "input_count"), -torch.ones(1), "negative counts"),
    ((*BLOCK, "input_count"), torch.ones(1, dtype=torch.long), "not a tensor of real numbers"),
    ((*BLOCK, "output_sum"), "sum", "output_sum: not a tensor"),
    ((*GROUP, "params"), ["0.weight", "2.bias"], "a parameter stands in two groups|belongs to an"),
    ((*GROUP, "shapes"), [[4, 3], [5]], "matrices of another size"),
    ((*GROUP, "matrix"), [1, 4, 5], "matrices of another size"),
    ((*GROUP, "matrix"), [1, 2, 10], r"groups\[0\]|a tensor|shape"),
    ((*GROUP, "folds"), [[[[4, 3], [0, 0]]], []], "no permutation"),
    ((*GROUP, "role"), "mixed", "none of 'joint'"),
    ((*GROUP, "treatment"), "diag", "no treatment of such a group"),
    ((*GROUP, "name"), "other", "called by its first parameter"),
]


@pytest.mark.parametrize(("path", "value", "says"), TABLE, ids=lambda v: str(v)[:40])
def test_each_fault_is_told_by_its_place(path, value, says):
    la, case = fitted()
    changed = resealed(with_value(la.state_dict(), path, value))
    expected = answers(la, case.x)
    with pytest.raises(InvalidValue, match=says) as caught:
        la.load_state_dict(changed)
    assert same(answers(la, case.x), expected)
    assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("number", "says"), [(FORMAT + 1, "newer version"), (3, "older version"), ("5", "whole")]
)
def test_states_of_other_versions(number, says, tmp_path):
    la, case = fitted()
    state = sealed({**la.state_dict(), "format": number})
    with pytest.raises(InvalidValue, match=says):
        la.load_state_dict(state)
    torch.save(state, tmp_path / "la.pt")
    with pytest.raises(InvalidValue, match=says):
        Laplace.load(tmp_path / "la.pt", case.model)
    curvature = sealed({**la.curvature.state_dict(), "format": number})
    with pytest.raises(InvalidValue, match=says):
        Curvature.from_state(curvature, case.model, la.options)


def test_bits_that_fell_over(tmp_path):
    """torch reads such a file without a word: it checks none of its checksums."""
    la, case = fitted()
    la.save(tmp_path / "la.pt")
    whole = (tmp_path / "la.pt").read_bytes()
    needle = la.curvature.blocks["2.weight"].tensors()["output_sum"].numpy().tobytes()
    place = whole.index(needle)
    bad = bytearray(whole)
    bad[place + 6] ^= 1  # a high bit of the mantissa
    (tmp_path / "la.pt").write_bytes(bytes(bad))
    with pytest.raises(InvalidValue, match="not those that were saved"):
        Laplace.load(tmp_path / "la.pt", case.model)


@pytest.mark.parametrize(
    "state", [None, 3, [], "state", {}, {1: 2}, torch.zeros(2), {"format": FORMAT}]
)
def test_what_is_no_state(state, tmp_path):
    la, case = fitted()
    with pytest.raises(InvalidValue, match="not the state of a Laplace posterior"):
        la.load_state_dict(state)
    with pytest.raises(InvalidValue, match="not the state of a curvature"):
        Curvature.from_state(state, case.model, la.options)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InvalidValue, match="not the state of a Laplace posterior"):
        Laplace.load(tmp_path / "other.pt", case.model)


def test_a_models_own_state(tmp_path):
    la, case = fitted()
    torch.save(case.model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(InvalidValue, match="not the state of a Laplace posterior"):
        Laplace.load(tmp_path / "model.pt", case.model)
    with pytest.raises(FileNotFoundError):
        Laplace.load(tmp_path / "none.pt", case.model)


def test_a_curvature_of_no_data_comes_back():
    case = build("mlp-tanh")
    empty = Curvature(case.model, case.likelihood, seed=3)
    again = Curvature.from_state(empty.state_dict(), case.model, empty.options)
    whole, other = again.fit(case.batches), empty.fit(case.batches)
    assert torch.equal(whole.blocks["0.weight"].dense(), other.blocks["0.weight"].dense())
    known = other.empty()
    assert Curvature.from_state(known.state_dict(), case.model, known.options).n_data == 0
    la, _ = fitted()
    state = {**la.state_dict(), "curvature": known.state_dict()}
    with pytest.raises(InvalidValue, match="a posterior needs data"):
        la.load_state_dict(sealed(state))


def test_a_weighted_curvature_comes_back():
    """Its counts are no whole numbers."""
    la, case = fitted()
    la.curvature.ggn = la.curvature.ggn.scaled(0.3)
    again = Curvature.from_state(la.curvature.state_dict(), case.model, la.options)
    assert again.ggn.n_data == 0.3 * 7


def test_an_exception_of_the_model_is_not_taken_for_damage():
    """The seal and the checks of values come first; errors of ours pass as they are."""
    la, case = fitted()
    state = copy.deepcopy(la.state_dict())
    case.model[0].weight.requires_grad_(False)
    with pytest.raises(InvalidValue, match="another model"):
        la.load_state_dict(state)
