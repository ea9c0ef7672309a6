"""`Laplace.fit` that goes on after its process died: the same posterior to the last bit."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from cases import build
from pulls import data, network
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Checkpoint, Laplace
from kfac_laplace.errors import InvalidValue

STRUCTURES = ("kron", "ekfac", "diag", "full", "lowrank")


class Interrupted(Exception):
    pass


class Dying:
    def __init__(self, batches, k):
        self._batches, self._left = batches, k

    def __iter__(self):
        for batch in self._batches:
            if not self._left:
                raise Interrupted
            self._left -= 1
            yield batch


def answers(la, x):
    state = la.state_dict()
    return [state, la.log_marginal_likelihood(), la(x), la.sample(3)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_posterior_is_that_of_the_whole_fit(structure, tmp_path):
    case = build("mlp-tanh")
    options = {"hessian_structure": structure, "fisher": "mc", "seed": 3}
    wanted = answers(Laplace(case.model, **options).fit(case.batches), case.x)
    for k in range(6 if structure == "ekfac" else 3):
        path = tmp_path / f"{k}"
        first = Laplace(case.model, **options)
        with pytest.raises(Interrupted):
            first.fit(Dying(case.batches, k), checkpoint=path)
        assert first.n_data == 0
        found = Laplace(build("mlp-tanh").model, **options).fit(case.batches, checkpoint=path)
        assert_same_bits(answers(found, case.x), wanted)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_data_added_to_a_posterior(structure, reloaded, tmp_path):
    """The earlier data are in the file; the posterior to which they belong has to be there."""
    case, more = build("mlp-tanh"), build("mlp-tanh").batches[::-1]
    options = {"hessian_structure": structure, "fisher": "mc"}
    la = Laplace(case.model, **options).fit(case.batches)
    la.save(tmp_path / "posterior.pt")
    wanted = answers(Laplace.load(tmp_path / "posterior.pt", case.model).fit(
        more, override=False
    ), case.x)  # fmt: skip
    with pytest.raises(Interrupted):
        la.fit(Dying(more, 2), override=False, checkpoint=tmp_path / "fit")
    assert la.n_data == 7
    again = Laplace.load(tmp_path / "posterior.pt", case.model) if reloaded else la
    again.fit(more, override=False, checkpoint=tmp_path / "fit")
    assert_same_bits(answers(again, case.x), wanted)
    assert again.n_data == 14


def test_after_other_weights_the_next_fit_may_take_the_same_path(tmp_path):
    """Training goes on, and each epoch ends with a fit: the file of the last one is gone."""
    model, (x, y) = network(), data()
    la, path = Laplace(model), tmp_path / "fit"
    for _ in range(3):
        la.fit([(x, y)], checkpoint=path)
        with torch.no_grad():
            model[0].weight += 0.01
    assert not path.exists()


def test_the_file_stays_until_held_out_data_have_been_read(tmp_path):
    """They may take as long as the fit, and are read after it."""
    case = build("mlp-tanh")
    place = Checkpoint(tmp_path / "fit", every=1)
    la = Laplace(case.model)
    with pytest.raises(Interrupted):
        la.fit(case.batches, Dying(case.batches, 1), checkpoint=place)
    assert la.n_data == 0
    ran = []
    twin = build("mlp-tanh")
    twin.model.register_forward_hook(lambda *_: ran.append(1))
    found = Laplace(twin.model).fit(twin.batches, twin.batches, checkpoint=place)
    wanted = Laplace(case.model).fit(case.batches, case.batches)
    assert_same_bits(answers(found, case.x), answers(wanted, case.x))
    assert not place.path.exists()


def test_a_prior_that_does_not_fit_is_said_before_the_rest_is_read(tmp_path):
    case, path = build("mlp-tanh"), tmp_path / "fit"
    with pytest.raises(Interrupted):
        Laplace(case.model).fit(Dying(case.batches, 2), checkpoint=path)
    read = []

    def loader():
        for batch in case.batches:
            read.append(1)
            yield batch

    with pytest.raises(InvalidValue, match="prior_precision"):
        Laplace(case.model, prior_precision=torch.ones(9)).fit(loader(), checkpoint=path)
    assert not read
    assert path.exists()


def test_mappings_by_another_key(tmp_path):
    x, y = build("mlp-tanh").x, build("mlp-tanh").y
    rows = [{"input": one, "target": label} for one, label in zip(x, y, strict=True)]
    made = lambda: Laplace(build("mlp-tanh").model, dict_key_y="target")  # noqa: E731
    batches = [*DataLoader(rows, 2)]
    wanted = answers(made().fit(batches), {"input": x})
    with pytest.raises(Interrupted):
        made().fit(Dying(batches, 2), checkpoint=tmp_path / "fit")
    found = made().fit(batches, checkpoint=tmp_path / "fit")
    assert_same_bits(answers(found, {"input": x}), wanted)


def test_float32_networks_of_many_batches(tmp_path):
    """Rows wait for their products in the models' own precision."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(96, 3)
    )
    data = TensorDataset(torch.randn(60, 1, 6, 6), torch.randint(0, 3, (60,)))
    loader = DataLoader(data, 4)
    wanted = Laplace(model).fit(loader).state_dict()
    for k in (1, 7, 14):
        with pytest.raises(Interrupted):
            Laplace(model).fit(Dying(loader, k), checkpoint=tmp_path / "fit")
        found = Laplace(model).fit(loader, checkpoint=tmp_path / "fit")
        assert_same_bits(found.state_dict(), wanted)
