"""A model on another device than the CPU: what it gives, what it holds there, and who waits."""

from __future__ import annotations

from typing import Any

import pytest
from devices import counted, on_device
from laws import EXACT, NEGLIGIBLE, relative_error
from processes import on_ranks
from torch.utils import backend_registration
from zoo.case import BUILDERS, build
from zoo.fitting import fitted
from zoo.parted import found

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no backends in Python",
)
#: Ends of searches, which stop within a tolerance.
SEARCHED = {"temperature": 1e-3}


def alone(folder: Any, function: Any, *args: Any) -> Any:
    """What a function returns in a process of its own, which ends with it."""
    return on_ranks(1, folder, function, *args)[0]


def check(got: on_device.Answers, want: on_device.Answers, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = relative_error(got[name], value, NEGLIGIBLE)
        assert error < SEARCHED.get(name, tolerance), f"{name}: {error:.1e}"


def test_the_simulated_device_refuses_strangers_and_counts(tmp_path):
    told = alone(tmp_path, counted.refusals)
    assert all("same device" in told.pop(name) for name in ("sum", "product", "cat"))
    assert told == {"number": "[4.0, 4.0, 4.0]", "without": "0", "with": "3", "bytes": "8000"}


@pytest.mark.slow
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_every_network(offload, tmp_path):
    got = alone(tmp_path, on_device.of_zoo, tuple(BUILDERS), offload)
    for name in BUILDERS:
        case = build(name)
        check(got[name], found(case, fitted(case)), case.tolerance)


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("structure", on_device.STRUCTURES)
def test_all_that_users_ask(structure, offload, tmp_path):
    if offload and structure in ("full", "lowrank"):
        with pytest.raises(InvalidValue, match="offload: one block of all parameters"):
            on_device.answers(structure, "cpu", offload=offload)
        return
    got = alone(tmp_path, on_device.on_the_device, structure, offload)
    check(got, on_device.answers(structure, "cpu"), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_training(offload, tmp_path):
    check(
        alone(tmp_path, on_device.trained_on_the_device, offload), on_device.trained("cpu"), EXACT
    )


@pytest.mark.slow
def test_where_a_default_device_is_set(tmp_path):
    got = alone(tmp_path, on_device.under_a_default_device)
    want = on_device.answers("kron", "cpu")
    check({name: got[name] for name in want}, want, EXACT)
    assert got["nll"].isfinite().all() and got["part"].isfinite()


@pytest.mark.slow
def test_what_the_device_holds(tmp_path):
    """With offload the mode stays there, and factors and bases of one layer at a time."""
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    here = alone(tmp_path / "here", counted.memory, None)
    there = alone(tmp_path / "there", counted.memory, "cpu")
    weights, layers = here["weights"], 9
    assert here["kept"] > here["factors"] + 2 * weights  # eigenvalues and eigenvectors
    assert there["kept"] < 1.1 * weights  # the mode
    assert there["evidence"] < 0.5 * here["evidence"]
    assert there["predictions"] < here["predictions"] / 3
    assert there["fit"] < here["fit"] - 0.9 * (layers - 1) / layers * here["factors"]


@pytest.mark.parametrize("offload", [("cpu", None), (None, "cpu")])
@pytest.mark.parametrize("structure", ["kron", "few directions", "diag"])
def test_curvature_that_lies_elsewhere_is_added(structure, offload, tmp_path):
    got = alone(tmp_path, on_device.merged, structure, *offload)
    check(got, on_device.of_merged(structure, "cpu", None, None), EXACT)


def test_the_precision_of_a_diagonal_posterior(tmp_path):
    got = alone(tmp_path, on_device.diagonal_words, "cpu")
    check(got, on_device.of_diagonal_words("cpu"), EXACT)


def test_on_the_cpu_nothing_changes():
    x, y = on_device.data(60, 5, 3)
    la, other = (
        Laplace(on_device.network(5, 12, 3), "classification", offload=offload).fit([(x, y)])
        for offload in (None, "cpu")
    )
    assert la.log_marginal_likelihood().equal(other.log_marginal_likelihood())
    with pytest.raises(InvalidValue, match="offload"):
        Laplace(la.model, "classification", offload="disk")


@pytest.mark.slow
def test_how_often_a_batch_waits_for_the_device(tmp_path):
    """Outputs, labels and curvature are looked at, however many layers there are."""
    found = alone(tmp_path, counted.waited_often)
    assert all(shallow == deep for shallow, deep in found.values()), found
    assert max(deep for _, deep in found.values()) <= 8, found
    assert {found[f"{structure} exact"] for structure in ("kron", "diag", "full")} == {(5, 5)}


@pytest.mark.slow
def test_random_numbers_of_the_device(tmp_path):
    assert all(alone(tmp_path, counted.drawn).values())


@pytest.mark.slow
@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("structure", ["kron", "few directions", "diag"])
def test_several_processes_with_a_device_each(structure, offload, tmp_path):
    first, second = on_ranks(2, tmp_path, on_device.on_ranks, structure, offload)
    assert all(first[name].equal(second[name]) for name in first)
    tolerance = 1e-3 if structure == "few directions" else EXACT  # the rows' order is another
    check(first, on_device.of_parts(structure, "cpu", None), tolerance)
