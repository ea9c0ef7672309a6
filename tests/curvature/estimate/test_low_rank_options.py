"""The low-rank structure as an option: ranks, files, and states that are none."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from cases import build
from laws import fitted
from torch import nn

from kfac_laplace import Curvature, Laplace, LowRank
from kfac_laplace.errors import InvalidType, InvalidValue

NAME = "lowrank"


def low(name, rank):
    """The one block of a case, and its curvature."""
    curvature = fitted(name, hessian_structure=LowRank(rank))
    return curvature.blocks[NAME], curvature


def test_the_word_is_the_default_rank():
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood, hessian_structure=NAME)
    assert curvature.options.hessian_structure == LowRank() == LowRank(rank=100)
    assert curvature.options.structure == curvature.options.one_block == NAME
    assert pickle.loads(pickle.dumps(LowRank(7))) == LowRank(7)


@pytest.mark.parametrize(
    ("rank", "error"),
    [(0, InvalidValue), (-3, InvalidValue), (2.5, InvalidType), (True, InvalidType)],
)
def test_a_rank_is_a_whole_number_above_zero(rank, error):
    with pytest.raises(error, match="rank"):
        LowRank(rank)


@pytest.mark.parametrize("structure", ["low-rank", 100, None, LowRank])
def test_other_structures_are_refused_with_those_that_there_are(structure):
    with pytest.raises(InvalidValue, match=r"hessian_structure.*'lowrank'.*LowRank\(rank=20\)"):
        Laplace(build("mlp-tanh").model, "classification", hessian_structure=structure)


def test_another_rank_is_another_structure():
    one, other = low("mlp-tanh", 3)[1], low("mlp-tanh", 4)[1]
    with pytest.raises(InvalidValue, match=r"LowRank\(rank=4\).*into.*LowRank\(rank=3\)"):
        one.merge(other)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("rank", [3, 1000])
def test_files_hold_the_rank(suffix, rank, tmp_path):
    if suffix == "safetensors":
        pytest.importorskip("safetensors")
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, hessian_structure=LowRank(rank)).fit(case.batches)
    la.save(tmp_path / f"la.{suffix}")
    again = Laplace.load(tmp_path / f"la.{suffix}", case.model)
    assert again.options.hessian_structure == LowRank(rank)
    one, other = la.curvature.blocks[NAME], again.curvature.blocks[NAME]
    assert torch.equal(one.rows, other.rows) and torch.equal(one.dropped, other.dropped)
    assert other.rank == rank and torch.equal(la(case.x), again(case.x))
    again.fit(case.batches, override=False)
    with pytest.raises(InvalidValue, match="hessian_structure"):
        Laplace.load(tmp_path / f"la.{suffix}", case.model, hessian_structure=LowRank(5))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rows", torch.ones(9, 43, dtype=torch.float64), "more directions than rank 4"),
        ("rows", torch.ones(4, 42, dtype=torch.float64), "rows"),
        ("rows", torch.ones(43, dtype=torch.float64), "rows"),
        ("rows", torch.full((4, 43), math.nan, dtype=torch.float64), "rows"),
        ("dropped", torch.tensor(-1.0, dtype=torch.float64), "not negative"),
        ("dropped", torch.ones(2, dtype=torch.float64), "dropped"),
    ],
)
def test_blocks_that_are_none_are_refused(name, value, said):
    _, curvature = low("mlp-tanh", 4)
    state = curvature.state_dict()
    state["ggn"]["blocks"][NAME][name] = value
    with pytest.raises(InvalidValue, match=said):
        Curvature.from_state(state, curvature.network.model, curvature.options)


@pytest.mark.parametrize("place", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_refused(place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), Overflowing(place))
    curvature = Curvature(model, "regression", hessian_structure=LowRank(2))
    with pytest.raises(InvalidValue, match="non-finite curvature"):
        curvature.accumulate(torch.randn(8, 3), torch.randn(8, 2))


class Overflowing(nn.Module):
    """The identity, whose gradient is another."""

    def __init__(self, gradient):
        super().__init__()
        self.gradient = gradient

    def forward(self, x):
        return Wrong.apply(x, self.gradient)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None


def test_a_model_card_and_a_summary_say_what_is_held(tmp_path):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, hessian_structure=LowRank(3)).fit(case.batches)
    block = la.curvature.blocks[NAME]
    assert f"share of the trace held {block.share:.4g}" in " ".join(la.summary().split())
    assert 0 < block.share < 1 and repr(la).startswith("Laplace(Categorical, lowrank,")
    assert la.coverage["0.weight"] == NAME
