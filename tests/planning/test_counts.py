"""Operations and bytes against counts by hand, and against torch's own counter of the real pass."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_laplace import Kron, Laplace
from kfac_laplace.curvature.linalg.basis import Completed
from kfac_laplace.planning.counter import Count
from kfac_laplace.planning.held import held
from kfac_laplace.planning.plan import Plan

N, BATCHES = 40, 3


def part(plan: Plan, name: str) -> float:
    """Operations of a part."""
    return next(each.operations for each in plan.parts if each.name == name)


def test_a_linear_net_is_counted_as_by_hand() -> None:
    """o·i multiply-adds forward, as many back where anything is below, and rows' products."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    x, y = torch.randn(N, 7).double(), torch.randint(5, (N,))
    plan = Laplace(model, "classification").plan(x, y, n_data=N * BATCHES)
    assert (plan.batches, plan.vectors, plan.backwards) == (BATCHES, 4, 4 * BATCHES)
    assert part(plan, "forward") == BATCHES * 2 * N * (7 * 12 + 12 * 5)
    back = 2 * N * 12 * 5  # to the hidden layer alone
    squares = 2 * N * (12**2 + 5**2)  # of few columns, whole
    assert part(plan, "backward and B") == BATCHES * 4 * (back + squares)
    assert part(plan, "sums over inputs") == BATCHES * 2 * N * (8**2 + 13**2)


def test_symmetric_products_by_blas_count_half() -> None:
    """k i (i + 1) for k rows of i columns: an addition and a multiplication for half a square."""
    model = nn.Linear(60, 1).double()
    x, y = torch.randn(100, 60).double(), torch.randn(100, 1).double()
    plan = Laplace(model, "regression").plan(x, y)
    assert part(plan, "sums over inputs") == 100 * 61 * 62


def test_a_convolution_is_counted_as_by_hand() -> None:
    """Each output position takes o·c·k² multiply-adds; reduce squares one row an example."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 2),
    )  # fmt: skip
    x, y = torch.randn(N, 3, 8, 8), torch.randint(2, (N,))
    plan = Laplace(model, "classification", kfac_approx="reduce").plan(x, y)
    assert part(plan, "forward") == 2 * N * (64 * 6 * 27 + 6 * 2)
    assert part(plan, "backward and B") == 2 * N * (6 * 2 + 6**2 + 2**2)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_passes_are_counted_as_torch_counts_the_real_ones(structure: str) -> None:
    """Of a model whose parameters are all in layers, forward and backward through the layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2),
        nn.Flatten(), nn.Linear(16 * 4, 3),
    )  # fmt: skip
    x, y = torch.randn(16, 3, 7, 7), torch.randint(3, (16,))
    model.eval()
    with FlopCounterMode(display=False) as forward:
        model(x)
    plan = Laplace(model, "classification", hessian_structure=structure).plan(x, y)
    assert part(plan, "forward") == forward.get_total_flops()


CASES = {
    "kron": {},
    "kron, one vector": {"fisher": "mc"},
    "ekfac": {"hessian_structure": "ekfac"},
    "diag": {"hessian_structure": "diag"},
    "full": {"hessian_structure": "full"},
    "lowrank": {"hessian_structure": "lowrank"},
    "kron, few directions": {"hessian_structure": Kron(8)},
    "hybrid": {"fisher": "hybrid"},
    "last layer": {"subset_of_weights": "last_layer"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_bytes_are_those_of_a_fit(options: dict[str, Any]) -> None:
    """Counted while a fit runs: held exactly, at the peak within a fifth."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 24), nn.Tanh(),
        nn.Linear(24, 4),
    )  # fmt: skip
    batches = [(torch.randn(N, 2, 8, 8), torch.randint(4, (N,))) for _ in range(BATCHES)]
    plan = Laplace(model, "classification", **options).plan(*batches[0], n_data=N * BATCHES)
    la, count = Laplace(model, "classification", **options), Count()
    count.leave_out([*model.parameters(), *(t for batch in batches for t in batch)])
    with count.watching():
        la.fit(batches)
    tensors = [t for block in la.curvature.blocks.values() for t in block.tensors().values()]
    end = sum(t.numel() * t.element_size() for t in tensors)
    assert held(la.curvature.blocks, 1).end == end
    assert plan.memory.factors == pytest.approx(end, rel=0.01)
    assert plan.memory.peak == pytest.approx(count.peak, rel=0.2)


@pytest.mark.parametrize("structure", ["kron", Kron(3), Kron(8)], ids=str)
def test_bytes_for_predictions_are_those_of_the_bases(structure: Any) -> None:
    """Columns of whole matrices; of few, the reflected ones and two small squares."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 12))
    batches = [(torch.randn(16, 24), torch.randint(12, (16,))) for _ in range(3)]
    la = Laplace(model, "classification", hessian_structure=structure)
    plan = la.plan(*batches[0], n_data=48)
    parts: list[torch.Tensor] = []
    for block in la.fit(batches).curvature.blocks.values():
        for basis in block.spectrum.bases or ():
            few = isinstance(basis, Completed)
            parts += [basis.reflected, basis.middle, basis.turn] if few else [basis]
    assert plan.memory.bases == sum(t.numel() * t.element_size() for t in parts)


def test_rows_that_are_kept_become_products_when_they_are_many() -> None:
    """Held bytes after any number of batches, as a fit leaves them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))
    for batches in (1, 2, 3, 5, 8, 13):
        data = [(torch.randn(16, 20), torch.randn(16, 2)) for _ in range(batches)]
        plan = Laplace(model, "regression").plan(*data[0], n_data=16 * batches)
        la = Laplace(model, "regression").fit(data)
        tensors = [t for block in la.curvature.blocks.values() for t in block.tensors().values()]
        assert plan.memory.factors == sum(t.numel() * t.element_size() for t in tensors)


def test_vectors_begin_at_a_narrow_head() -> None:
    """d of them in place of C − 1."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 40))
    x, y = torch.randn(32, 6), torch.randint(40, (32,))
    plan = Laplace(model, "classification").plan(x, y)
    assert plan.vectors == 5
    assert any("input of the last layer" in note for note in plan.notes)
    assert any(each.name == "roots" for each in plan.parts)
