"""A fit that was interrupted at any batch goes on to the same bits as one that was not."""

from __future__ import annotations

import logging
from collections import UserDict

import numpy
import pytest
import torch
from bits import assert_same_bits
from cases import KINDS, build
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kfac_laplace import Checkpoint, Curvature, Kron, LowRank
from kfac_laplace.curvature.live_state import live_to_plain
from kfac_laplace.errors import InvalidType, InvalidValue

STRUCTURES = ("kron", "ekfac", "diag", "full", LowRank(3), Kron(2))


class Interrupted(Exception):
    """What a process dies of."""


class Dying:
    """A loader that dies before it yields its k-th batch, counted over all passes."""

    def __init__(self, loader, k):
        self._loader, self._left = loader, k

    def __iter__(self):
        for batch in self._loader:
            if not self._left:
                raise Interrupted
            self._left -= 1
            yield batch


def bits(curvature):
    return [live_to_plain(curvature.ggn), curvature.generator.get_state(), bases(curvature)]


def bases(curvature):
    return {name: list(one) for name, one in curvature.ggn.bases.items()}


def fit(case, batches, path, of=Curvature, **options):
    """A fit, by a process of its own as far as objects go."""
    curvature = of(case.model, case.likelihood, **options)
    return curvature.fit(batches, checkpoint=path)


def interrupted(case, batches, path, k, **options):
    with pytest.raises(Interrupted):
        fit(case, Dying(batches, k), path, **options)


def assert_goes_on(name, path, k, every=1, **options):
    whole = build(name)
    wanted = bits(Curvature(whole.model, whole.likelihood, **options).fit(whole.batches))
    first, second = build(name), build(name)
    place = Checkpoint(path, every)
    interrupted(first, first.batches, place, k, **options)
    assert path.exists() or not k
    found = fit(second, second.batches, place, **options)
    assert_same_bits(bits(found), wanted)
    assert [*path.parent.iterdir()] == []


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("name", ["mlp-regression", "cnn", "tokens", "twice"])
def test_interrupted_at_every_batch(name, structure, tmp_path):
    passes = 2 if structure == "ekfac" else 1
    for k in range(3 * passes):
        assert_goes_on(name, tmp_path / "fit", k, hessian_structure=structure)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(name, tmp_path):
    assert_goes_on(name, tmp_path / "fit", 2)


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "mc"},
        {"fisher": "hybrid"},
        {"fisher": "mc", "hessian_structure": "ekfac"},
        {"fisher": "empirical"},
        {"factor_dtype": torch.float32},
        {"kfac_approx": "expand"},
        {"subset_of_weights": "last_layer"},
        {"subset_of_weights": torch.arange(5), "hessian_structure": "full"},
        {"joint_bias": False},
        {"memory_budget": 2**20},
    ],
    ids=str,
)
def test_options_and_draws(options, tmp_path):
    for k in (1, 2):
        assert_goes_on("mlp-tanh", tmp_path / "fit", k, **options)


def test_interrupted_again_and_again(tmp_path):
    """Each life counts one batch more; the last is the whole fit."""
    path, case = tmp_path / "fit", build("vit")
    wanted = bits(Curvature(case.model, case.likelihood).fit(case.batches))
    lives = 0
    while True:
        lives += 1
        again = build("vit")
        curvature = Curvature(again.model, again.likelihood)
        left = len(torch.load(path)["pass"]["digests"]) if path.exists() else 0
        try:
            curvature.fit(Dying(again.batches, left + 1), checkpoint=path)
        except Interrupted:
            continue
        break
    assert lives == 3
    assert_same_bits(bits(curvature), wanted)


@pytest.mark.parametrize("every", [1, 2, 5, None])
def test_how_often_it_is_written_changes_nothing(every, tmp_path):
    for k in (1, 2):
        assert_goes_on("mlp-tanh", tmp_path / "fit", k, every)


def test_rows_that_are_kept_and_rows_that_are_summed(tmp_path):
    """Gram matrices keep rows while they are few: in the sums there is one order of additions."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(40, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    loader = [(torch.randn(9, 40), torch.randn(9, 2)) for _ in range(12)]
    wanted = bits(Curvature(model, "regression").fit(loader))
    for k in range(12):
        path = tmp_path / f"{k}"
        with pytest.raises(Interrupted):
            Curvature(model, "regression").fit(Dying(loader, k), checkpoint=path)
        assert_same_bits(bits(Curvature(model, "regression").fit(loader, checkpoint=path)), wanted)


# --- loaders -----------------------------------------------------------------------------------


def shuffled(case, own=None, kind="pair", **options):
    """A loader that shuffles, by the global generator or by one of its own."""
    generator = None if own is None else torch.Generator().manual_seed(own)
    data = TensorDataset(case.x, case.y)
    collate = None
    if kind != "pair":

        def collate(pairs):
            x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
            return UserDict(input=x, labels=y) if kind == "user" else {"input": x, "labels": y}

    return DataLoader(data, 2, shuffle=True, generator=generator, collate_fn=collate, **options)


@pytest.mark.parametrize("own", [None, 7])
@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("kind", ["pair", "dict", "user"])
def test_shuffling_loaders_go_on_in_their_order(structure, own, kind, tmp_path):
    """The order is that of the pass that was interrupted, whatever was drawn since."""
    case = build("mlp-tanh")
    options = {"hessian_structure": structure, "fisher": "mc"}
    for k in range(4 * (1 + (structure == "ekfac"))):
        torch.manual_seed(1)
        loader = shuffled(case, own, kind)
        wanted = bits(Curvature(case.model, case.likelihood, **options).fit(loader))
        left = loader.generator and loader.generator.get_state()
        torch.manual_seed(1)
        path = tmp_path / f"{k}"
        loader = Dying(shuffled(case, own, kind), k)
        loader.generator = loader._loader.generator
        with pytest.raises(Interrupted):
            Curvature(case.model, case.likelihood, **options).fit(loader, checkpoint=path)
        torch.manual_seed(1 if k == 0 else 99)
        before = torch.get_rng_state()
        loader = shuffled(case, own, kind)
        found = Curvature(case.model, case.likelihood, **options).fit(loader, checkpoint=path)
        assert_same_bits(bits(found), wanted)
        assert torch.equal(torch.get_rng_state(), before)
        assert left is None or torch.equal(loader.generator.get_state(), left)


class Noisy(Dataset):
    """Examples that numpy and torch draw from anew each time."""

    def __len__(self):
        return 6

    def __getitem__(self, k):
        x = torch.randn(4, dtype=torch.float64) + numpy.random.rand()
        return x, torch.tensor(k % 3)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_data_that_are_drawn_are_drawn_alike(structure, tmp_path):
    case = build("mlp-tanh")
    make = lambda: Curvature(case.model, case.likelihood, hessian_structure=structure)  # noqa: E731

    def seed(k):
        torch.manual_seed(k)
        numpy.random.seed(k)

    seed(1)
    wanted = bits(make().fit(DataLoader(Noisy(), 2, shuffle=True)))
    after = numpy.random.rand()
    for k in range(1, 3 * (1 + (structure == "ekfac"))):
        seed(1)
        with pytest.raises(Interrupted):
            make().fit(Dying(DataLoader(Noisy(), 2, shuffle=True), k), checkpoint=tmp_path / "fit")
        seed(2)
        found = make().fit(DataLoader(Noisy(), 2, shuffle=True), checkpoint=tmp_path / "fit")
        assert_same_bits(bits(found), wanted)
        assert numpy.random.rand() == after


@pytest.mark.slow
def test_loaders_with_workers(tmp_path):
    case = build("mlp-tanh")
    options = {"num_workers": 1, "multiprocessing_context": "spawn"}
    torch.manual_seed(1)
    wanted = bits(Curvature(case.model, case.likelihood).fit(shuffled(case)))
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        dying = Dying(shuffled(case, **options), 2)
        Curvature(case.model, case.likelihood).fit(dying, checkpoint=tmp_path / "fit")
    found = Curvature(case.model, case.likelihood)
    found.fit(shuffled(case, **options), checkpoint=tmp_path / "fit")
    assert_same_bits(bits(found), wanted)


# --- data added to earlier ones ----------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_data_that_are_added_to_others(structure, tmp_path):
    case, more = build("mlp-tanh"), build("mlp-tanh").batches[::-1]
    options = {"hessian_structure": structure, "fisher": "mc"}
    both = Curvature(case.model, case.likelihood, **options).fit(case.batches)
    state = both.copy()
    wanted = bits(both.fit(more))
    for k in (1, 2):
        with pytest.raises(Interrupted):
            state.copy().fit(Dying(more, k), checkpoint=tmp_path / "fit")
        assert_same_bits(bits(state.copy().fit(more, checkpoint=tmp_path / "fit")), wanted)


def test_a_part_of_the_data_leaves_its_file(tmp_path):
    case, place = build("mlp-tanh"), Checkpoint(tmp_path / "part", every=1)
    curvature = Curvature(case.model, case.likelihood).read(case.batches, checkpoint=place)
    again = Curvature(case.model, case.likelihood).read(case.batches, checkpoint=place)
    assert_same_bits(bits(again), bits(curvature))
    place.remove()
    assert [*tmp_path.iterdir()] == []
    place.remove()


def test_a_file_that_is_kept_needs_no_pass(tmp_path):
    case, place = build("cnn"), Checkpoint(tmp_path / "fit", keep=True)
    wanted = bits(Curvature(case.model, case.likelihood).fit(case.batches, checkpoint=place))
    ran = []
    case.model.register_forward_hook(lambda *_: ran.append(1))
    found = Curvature(case.model, case.likelihood).fit(case.batches, checkpoint=place)
    assert_same_bits(bits(found), wanted)
    assert not ran
    assert (tmp_path / "fit").exists()


def test_the_groups_are_checked_before_the_rest_is_read(tmp_path):
    """As after the first batch of a fit that begins."""
    case, asked = build("mlp-tanh"), []
    path = tmp_path / "fit"
    interrupted(case, case.batches, path, 2)
    curvature = Curvature(case.model, case.likelihood)

    def check():
        asked.append(curvature.n_data)

    curvature.read(case.batches, check=check, checkpoint=path)
    assert asked == [6]


def test_what_is_said(tmp_path, caplog):
    case = build("mlp-tanh")
    interrupted(case, case.batches, tmp_path / "fit", 2)
    with caplog.at_level(logging.INFO, "kfac_laplace"):
        fit(case, case.batches, tmp_path / "fit")
    assert "going on after 2 batches" in caplog.text


# --- what a checkpoint is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Checkpoint(3), InvalidType),
        (lambda: Checkpoint(""), InvalidType),
        (lambda: Checkpoint("fit", every=0), InvalidValue),
        (lambda: Checkpoint("fit", every=1.5), InvalidType),
        (lambda: Checkpoint("fit", keep="yes"), InvalidType),
    ],
)
def test_bad_options(make, error):
    with pytest.raises(error):
        make()


def test_no_pass_without_a_place_to_write(tmp_path):
    case = build("mlp-tanh")
    ran = []
    case.model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(FileNotFoundError):
        fit(case, case.batches, tmp_path / "none" / "fit")
    with pytest.raises(IsADirectoryError):
        fit(case, case.batches, tmp_path)
    with pytest.raises(InvalidType, match="checkpoint"):
        fit(case, case.batches, 3)
    assert not ran
