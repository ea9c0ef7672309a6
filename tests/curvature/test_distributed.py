"""Curvature over ranks is that of one process with all data, and the same bits on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from curvature import parted, parted_ends
from processes import on_ranks, survivors
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.ranks import shared_jobs
from kfac_laplace.curvature.shards import own_part
from kfac_laplace.errors import InvalidType, InvalidValue

#: Sums in another order, in float64.
ROUNDING = 1e-10
#: Three ranks, of which the last has no data; as many batches on none.
ENDS = (9, parted.N, parted.N)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What three ranks found."""
    return on_ranks(3, tmp_path_factory.mktemp("ranks"), parted.base, ENDS)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """What one process found."""
    return parted.alone(ENDS, parted.STRUCTURES)


def assert_same_bits(found: list[dict[Any, Any]]) -> None:
    """All ranks have the same tensors."""
    first, *others = found
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("more", ["", ", more"])
@pytest.mark.parametrize("structure", parted.STRUCTURES)
def test_a_fit_of_parts_is_that_of_one_process(structure, more, ranks, alone):
    got = [each["fits"][structure + more] for each in ranks]
    assert_same_bits(got)
    for name, want in alone[structure + more].items():
        if name == "samples":  # by eigenvectors, whose signs rounding decides
            continue
        torch.testing.assert_close(got[0][name], want, rtol=ROUNDING, atol=ROUNDING)


def test_few_directions_of_parts_have_the_traces_of_all(ranks):
    """Which are left out depends on their order, so sums do not; all have the same bits."""
    got = [each["leading"] for each in ranks]
    assert_same_bits(got)
    one = Curvature(parted.network(), "classification").fit(parted.whole(ENDS))
    for name, block in one.blocks.items():
        torch.testing.assert_close(got[0][f"block {name}"].trace(), block.dense().trace())


def test_batches_of_parts_are_those_of_one_process(ranks):
    x, y = parted.data()
    curvature = Curvature(parted.network(), "classification")
    for step in (0.0, 1.0):
        curvature.accumulate(x + step, y)
    for rank in ranks:
        for got, block in zip(rank["batchwise"], curvature.blocks.values(), strict=True):
            torch.testing.assert_close(got, block.dense(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("fisher", ["mc", "hybrid"])
def test_ranks_that_draw_have_the_same_bits(fisher, ranks):
    assert_same_bits([each["drawn"][fisher] for each in ranks])


def test_ranks_draw_apart(ranks):
    """Were labels drawn by the same numbers on each rank, their errors would not average out."""
    first, second, empty = (each["seeds"] for each in ranks)
    assert len(first) == len(second) == 2 and not empty  # another one for each fit
    assert first.isdisjoint(second)


def test_targets_that_are_none_end_all(ranks):
    """On one rank alone: the others do not wait for it."""
    (own, says), *others = (each["unlike"] for each in ranks)
    assert own and own != "OtherRankFailed"
    assert all(error == "OtherRankFailed" for error, _ in others)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size"), [(parted.N, 4), (7, 1), (2, 5)])
def test_repeated_examples_count_once(shuffle, n, size, ranks):
    x, y = parted.data()
    want = Curvature(parted.network(), "classification", hessian_structure="full")
    want.fit([(x[:n], y[:n])])
    found = [each["sampled"][shuffle, n, size] for each in ranks]
    assert sorted(index for each in found for index in each["seen"]) == list(range(n))
    for each in found:
        assert each["n_data"] == n
        torch.testing.assert_close(
            each["full"], want.blocks["full"].dense(), rtol=ROUNDING, atol=ROUNDING
        )


def test_predictions_of_parts_are_those_of_one_process(ranks):
    """In the order of the data set, whatever that of the sampler; so are held-out choices."""
    want, got = parted.predicted_alone(), [each["predicted"] for each in ranks]
    assert_same_bits(got)
    for name, value in want.items():
        if not name.startswith("linear"):  # by eigenvectors, whose signs rounding decides
            rounding = 1e-6 if name == "scaling" else ROUNDING  # a search ends at its own precision
            torch.testing.assert_close(got[0][name], value, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("kind", "failing", "says"),
    [
        ("nan on rank 1", [1], "non-finite values"),
        ("bad loader on rank 0", [0], "a batch is a pair"),
        ("no loader on rank 2", [2], "train_loader"),
        ("the same data", [0, 1, 2], "began with the same batch"),
        ("no data", [0, 1, 2], "no rank's loader yielded a batch"),
        ("other weights", [0, 1, 2], "different weights or buffers"),
        ("other options", [0, 1, 2], "different structures"),
    ],
)
def test_a_failure_ends_all_with_its_message(kind, failing, says, ranks):
    for rank, each in enumerate(ranks):
        error, message, n_data, kept = each["failing"][kind]
        assert (error != "OtherRankFailed") == (rank in failing), message
        assert says in message
        assert kept
        assert n_data in (0, parted.N)


@pytest.mark.slow
def test_interrupted_ranks_go_on_to_the_same_bits(tmp_path):
    """Whichever rank fails, in whichever pass; files are gone at the end."""
    found = on_ranks(3, tmp_path, parted_ends.all_resumed, ENDS)
    for structure, cases in parted_ends.INTERRUPTED.items():
        for k in range(len(cases)):
            told = [each[structure][k] for each in found]
            assert any("the disk is gone" in said for said, _, _ in told)
            assert all(said and equal and not left for said, equal, left in told), told


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path):
    found = survivors(3, tmp_path, parted_ends.killed, ENDS)
    assert found.keys() == {0, 2}
    for message, n_data in found.values():
        assert message and n_data == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", parted_ends.KILLED)
def test_a_fit_goes_on_after_its_processes_were_killed(how, tmp_path):
    """In new processes, to the bits of a fit without interruption."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    _, at = parted_ends.KILLED[how]
    raised = survivors(3, first, parted_ends.fitted_until_killed, ENDS, how, tmp_path / "fit")
    assert raised.keys() == {rank for rank in range(3) if at[rank] is None}
    assert all(raised.values())
    assert how == "before the first batch" or any(tmp_path.glob("fit*"))
    assert all(on_ranks(3, second, parted_ends.gone_on, ENDS, how, tmp_path / "fit"))
    assert not any(tmp_path.glob("fit*"))


# --- one process ---------------------------------------------------------------------------------


def test_a_process_group_takes_torch_distributed():
    la = Laplace(parted.network(), process_group="world")
    with pytest.raises(InvalidValue, match="not running"):
        la.fit(parted.whole(ENDS))


@pytest.mark.parametrize("group", ["all", 3, object()])
def test_something_else_is_no_process_group(group):
    with pytest.raises(InvalidType, match="no process group"):
        Curvature(parted.network(), "classification", process_group=group)


@dataclass(frozen=True)
class Several:
    """What loaders look at of ranks."""

    size: int


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("drop_last", [False, True])
def test_parts_are_the_data(n, ranks, drop_last):
    """Each example once, whatever the sampler repeats; what it drops stays out."""
    dataset = TensorDataset(torch.arange(n))
    seen = []
    for rank in range(ranks):
        sampler = DistributedSampler(dataset, ranks, rank, shuffle=True, drop_last=drop_last)
        loader = DataLoader(dataset, 2, sampler=sampler)
        own = own_part(loader, Several(ranks))
        before = [x.tolist() for (x,) in loader]
        seen += [int(i) for (x,) in own for i in x]
        assert sum(len(x) for (x,) in own) == sum(min(2, len(x)) for (x,) in own)
        assert [x.tolist() for (x,) in loader] == before  # the caller's is as it was
    if drop_last and n >= ranks:
        assert len(seen) == len({*seen}) == n // ranks * ranks
    elif not drop_last:
        assert sorted(seen) == list(range(n))


def test_loaders_of_other_kinds_are_left_alone():
    batches = [(torch.ones(2), torch.ones(2))]
    assert own_part(batches, Several(2)) is batches
    loader = DataLoader(TensorDataset(torch.ones(3)))
    assert own_part(loader, Several(2)) is loader


def test_jobs_are_shared_out_by_cost():
    assert shared_jobs([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert shared_jobs([], 3) == []


def test_samplers_of_other_groups_are_refused():
    dataset = TensorDataset(torch.arange(6))
    loader = DataLoader(dataset, sampler=DistributedSampler(dataset, 3, 0))
    with pytest.raises(InvalidValue, match="3 parts for 2 ranks"):
        own_part(loader, Several(2))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_read_by_one_process_alone_is_told(parts, caplog):
    x, y = parted.data()
    dataset = TensorDataset(x, y)
    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, parts, 0))
    with caplog.at_level("WARNING", "kfac_laplace"):
        Curvature(parted.network(), "classification").fit(loader)
    told = [record.getMessage() for record in caplog.records]
    assert any("one of 2 parts of the data" in message for message in told) == (parts > 1)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
def test_sums_lie_in_order_and_make_the_block_again(structure):
    """Whatever the order in memory of what is added up: only so can they be sent."""
    curvature = Curvature(parted.network(), "classification", hessian_structure=structure)
    for block in curvature.fit(parted.whole(ENDS)).blocks.values():
        turned = {
            name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
            for name, tensor in block.tensors().items()
        }
        sums = replace(block, **turned).sums()
        assert all(tensor.is_contiguous() for tensor in sums.values())
        bases = block.bases() if structure == "ekfac" and block.kind == "ekfac" else None
        again = type(block).from_sums(block.layout, sums, bases)
        torch.testing.assert_close(again.dense(), block.dense(), rtol=1e-12, atol=1e-12)
