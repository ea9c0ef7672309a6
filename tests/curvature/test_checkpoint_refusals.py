"""Nothing is mixed: a checkpoint of other data, weights or options is refused, or a damaged one."""

from __future__ import annotations

import copy

import pytest
import torch
from bits import assert_same_bits
from cases import build
from mutants import mutants
from torch import nn

from kfac_laplace import Checkpoint, Curvature, Laplace
from kfac_laplace.curvature.batch_digest import digest
from kfac_laplace.curvature.live_state import live_to_plain
from kfac_laplace.curvature.model.random_states import RandomStates
from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.states.files import write
from kfac_laplace.states.plain import sealed


class Interrupted(Exception):
    pass


def dying(batches, k):
    yield from batches[:k]
    raise Interrupted


@pytest.fixture
def path(tmp_path):
    """The file of a fit of "mlp-tanh" that was interrupted after two of three batches."""
    case = build("mlp-tanh")
    with pytest.raises(Interrupted):
        Curvature(case.model, case.likelihood).fit(
            dying(case.batches, 2), checkpoint=tmp_path / "fit"
        )
    return tmp_path / "fit"


def fit(path, model=None, batches=None, likelihood="classification", key_y="labels", **options):
    case = build("mlp-tanh")
    curvature = Curvature(case.model if model is None else model, likelihood, **options)
    before = live_to_plain(curvature.ggn)
    try:
        return curvature.fit(
            case.batches if batches is None else batches, checkpoint=path, key_y=key_y
        )
    except InvalidValue:
        assert not curvature.n_data or batches is not None
        if batches is None:
            assert_same_bits(live_to_plain(curvature.ggn), before)
        raise


def refused(path, says, **changes):
    held = path.read_bytes()
    with pytest.raises(InvalidValue, match=says) as told:
        fit(path, **changes)
    assert path.read_bytes() == held
    assert [*path.parent.iterdir()] == [path]
    return str(told.value)


OPTIONS = {
    "hessian_structure": "diag",
    "kfac_approx": "expand",
    "fisher": "mc",
    "subset_of_weights": ["0.*"],
    "joint_bias": False,
    "uncovered": "freeze",
    "seed": 1,
    "factor_dtype": torch.float32,
    "class_axis": -1,
    "forward_fn": lambda model, x: model(x),
    "batch_fn": lambda batch: batch,
    "memory_budget": 2**20,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options(path, name):
    told = refused(path, f"{name}: the checkpoint is of a fit with another option", **{
        name: OPTIONS[name]
    })  # fmt: skip
    assert "Checkpoint(path).remove()" in told


def test_the_table_has_every_option(path):
    told = {*torch.load(path, weights_only=True)["bound"]["options"]}
    assert OPTIONS.keys() | {"likelihood", "key_y"} == told


def test_the_order_of_patterns(tmp_path):
    case, path = build("mlp-tanh"), tmp_path / "fit"
    patterns = {"0*": "expand", "*": "reduce"}
    with pytest.raises(Interrupted):
        Curvature(case.model, case.likelihood, kfac_approx=patterns).fit(
            dying(case.batches, 1), checkpoint=path
        )
    turned = dict(reversed(patterns.items()))
    refused(path, "kfac_approx: the checkpoint", kfac_approx=turned)


def test_another_likelihood_and_other_targets(path):
    refused(path, "likelihood: the checkpoint", likelihood="poisson")
    refused(path, "key_y: the checkpoint", key_y="y")


def moved(model):
    with torch.no_grad():
        model[2].bias[0] += 1e-12


CHANGES = {
    "weights": (moved, r"2\.bias: .*other weights.*other values"),
    "frozen": (lambda m: m[0].bias.requires_grad_(False), r"0\.bias.*requires_grad=True"),
    "precision": (lambda m: m.float(), r"0\.weight.*(float64|other values)"),
    "more": (lambda m: m.append(nn.Linear(3, 3).double()), r"3\.weight.*no such tensor"),
    "buffer": (lambda m: m.register_buffer("b", torch.ones(1)), r"b: .*no such tensor"),
    "shape": (lambda m: m.__setitem__(2, nn.Linear(5, 4).double()), r"2\.weight.*shape"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model(path, change):
    model = build("mlp-tanh").model
    changed, says = CHANGES[change]
    changed(model)
    refused(path, says, model=model)


def other_x(batches):
    x, y = batches[0]
    batches[0] = (x + 1e-9, y)


def other_y(batches):
    x, y = batches[1]
    batches[1] = (x, (y + 1) % 3)


def fewer(batches):
    del batches[1:]


def turned(batches):
    batches.reverse()


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (other_x, "batch 1 of other content"),
        (other_y, "batch 2 of other content"),
        (turned, "batch 1 of other content"),
        (fewer, "1 batches, where 2 were counted"),
    ],
)
def test_other_data(path, change, got):
    batches = build("mlp-tanh").batches
    change(batches)
    told = refused(path, got, batches=batches)
    assert str(path) in told and "made as it was" in told


def test_other_data_counted_before(path):
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    with pytest.raises(InvalidValue, match="other data counted before"):
        curvature.fit(case.batches, checkpoint=path)
    assert curvature.n_data == 7
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    with pytest.raises(InvalidValue, match="other data counted before"):
        la.fit(case.batches, override=False, checkpoint=path)
    assert la.n_data == 7


def test_a_loader_with_other_generators(path):
    from torch.utils.data import DataLoader, TensorDataset

    case = build("mlp-tanh")
    data = TensorDataset(case.x, case.y)
    loader = DataLoader(data, 3, generator=torch.Generator())
    refused(path, "other generators", batches=loader)


# --- files -------------------------------------------------------------------------------------


def test_files_of_others(path):
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood).fit(case.batches)
    for state, says in [
        (curvature.state_dict(), "not the state of a checkpoint of a fit"),
        (Laplace(case.model, case.likelihood).fit(case.batches).state_dict(), "not the state of"),
        (case.model.state_dict(), "not the state of a checkpoint"),
        ([1, 2], "not the state of a checkpoint"),
    ]:
        write(dict(state) if isinstance(state, dict) else state, path)
        refused(path, says)
    with pytest.raises(InvalidValue, match="the state of a checkpoint of a fit"):
        case = build("mlp-tanh")
        place = Checkpoint(path.parent / "own", keep=True)
        Curvature(case.model, case.likelihood).fit(case.batches, checkpoint=place)
        Laplace(case.model, case.likelihood).load_state_dict(torch.load(place.path))


def test_files_that_are_cut_short(path):
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "no checkpoint of a fit|checksum|damaged")


def test_bytes_that_flipped(path):
    whole = path.read_bytes()
    case = build("mlp-tanh")
    wanted = live_to_plain(Curvature(case.model, case.likelihood).fit(case.batches).ggn)
    refusals = 0
    for place in range(0, len(whole), 211):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = fit(path)
        except InvalidValue:
            refusals += 1
        else:  # between the entries of the archive
            assert_same_bits(live_to_plain(found.ggn), wanted)
    assert refusals > 20


@pytest.mark.slow
def test_any_changed_value_is_refused_or_changes_nothing(path):
    state = torch.load(path, weights_only=True)
    case = build("mlp-tanh")
    wanted = live_to_plain(Curvature(case.model, case.likelihood).fit(case.batches).ggn)
    refusals = 0
    for _, _, changed in mutants(state, every=23):
        write(changed, path)
        try:
            found = fit(path)
        except InvalidValue:
            refusals += 1
        else:
            assert_same_bits(live_to_plain(found.ggn), wanted)
    assert refusals > 20


@pytest.mark.slow
def test_with_a_right_checksum_nothing_raw_comes_either(path):
    """Nor does a refusal move a random state."""
    state = torch.load(path, weights_only=True)
    refusals = 0
    for _, _, changed in mutants(state, every=19):
        write(sealed(changed), path)
        before = RandomStates.now(torch.device("cpu"))
        try:
            fit(path)
        except KfacLaplaceError:
            refusals += 1
            assert before.same(RandomStates.now(torch.device("cpu")))
    assert refusals > 20


# --- digests -----------------------------------------------------------------------------------


def test_digests_tell_batches_apart():
    x, y = torch.randn(4, 3), torch.arange(4)
    batches = [
        (x, y),
        [x, y + 1],
        (x.double(), y),
        (x.reshape(2, 6), y),
        {"input": x, "labels": y},
        {"inputs": x, "labels": y},
        {"input": x, "labels": y, "name": "a"},
        {"input": x, "labels": y, "name": "b"},
        ((x, x), y),
        (x.numpy(), y),
        (x, None),
        (x, 3),
        (x.bool(), y),
        (torch.complex(x, x), y),
        (torch.randn(300, 300), y),
    ]
    found = [digest(batch) for batch in batches]
    assert len({*found}) == len(batches)
    assert found == [digest(copy.deepcopy(batch)) for batch in batches]
    assert digest((x.mT.contiguous().mT, y)) == found[0]  # values, not how they lie
    assert all(0 <= one < 2**63 for one in found)


def test_each_entry_of_small_tensors_counts_and_some_of_large_ones():
    x = torch.zeros(100, 30)
    whole = digest(x)
    for k in range(0, 3000, 97):
        changed = x.clone()
        changed.view(-1)[k] = 1
        assert digest(changed) != whole
    large = torch.zeros(500, 500)
    assert digest(large + 1e-30) != digest(large)
