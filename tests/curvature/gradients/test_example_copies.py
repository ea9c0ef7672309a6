"""Uses that no layer rule covers: the exact diagonal steps in, and nothing passes unnoticed."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_exact_blocks,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Autoencoder(nn.Module):
    """W on the way in, its transpose on the way out."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x).tanh(), self.encode.weight.T)


class Functional(nn.Module):
    """Raw parameters through F.linear."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))
        self.c = nn.Parameter(torch.randn(4))
        self.v = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w, bias=self.c).tanh(), weight=self.v)


class Distances(nn.Module):
    """Distances to centres, which no layer rule covers, and a gain on the whole output."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.gain = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(x, self.w.T)) * self.gain


class MixedUse(nn.Module):
    """The same weight in a recognised and in an unrecognised way."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.lin(x) + x @ self.lin.weight.square()).tanh())


class Unused(nn.Module):
    """A layer and a parameter that never reach the output."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.idle = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def test_a_weight_and_its_transpose_share_an_exact_block():
    """The two uses have input and output rows the other way round: no Kronecker product."""
    example = seeded_case(Autoencoder, likelihood="regression")
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert curvature.coverage["encode.weight"] == "dense"
    assert_exact_blocks(example, curvature, ["encode.weight"])
    assert_dense_structures_are_exact(example)


def test_functional_linear_on_raw_parameters():
    example = seeded_case(Functional)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert set(curvature.coverage.values()) == {"kron"}
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    values = dict(example.model.named_parameters())
    twin.load_state_dict({"0.weight": values["w"], "0.bias": values["c"], "2.weight": values["v"]})
    for layer, weight in (("0", "w"), ("2", "v")):
        factors = oracles.kfac_factors(twin, layer, example.data, "reduce")
        dense = oracles.kfac_block(factors, bias_column=weight == "w")
        assert relative_error(curvature.blocks[weight].dense(), dense) < EXACT


def test_an_unrecognised_use_falls_to_the_diagonal():
    example = seeded_case(Distances)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert_diagonal_blocks(example, curvature, ["w", "gain"])
    assert curvature.coverage["head.weight"] == "kron"
    assert_dense_structures_are_exact(example)


def test_a_mixed_use_falls_to_the_diagonal_as_a_whole():
    example = seeded_case(MixedUse)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert_diagonal_blocks(example, curvature, ["lin.weight"])
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_unused_parameters_have_zero_curvature(structure):
    example = seeded_case(Unused)
    curvature = fitted(example, hessian_structure=structure)
    assert_complete(curvature, example.model)
    idle = ["idle.weight", "idle.bias", "scale"]
    assert {name for name, kind in curvature.coverage.items() if kind == "unused"} == {*idle}
    if structure == "full":
        exact = oracles.ggn(example.model, *example.data, list(curvature.blocks["full"].params))
        assert relative_error(curvature.blocks["full"].dense(), exact) < EXACT
        return
    for name in idle:
        (block,) = [b for b in curvature.blocks.values() if name in b.params]
        assert block.dense().abs().max() == 0


def test_parametrised_modules_fall_to_the_diagonal_of_the_original_parameters():
    def make() -> nn.Module:
        return nn.Sequential(
            parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)
        )

    example = seeded_case(make)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    originals = [f"0.parametrizations.weight.original{i}" for i in (0, 1)]
    assert_diagonal_blocks(example, curvature, originals)
    assert curvature.coverage["2.weight"] == "kron"
    assert_dense_structures_are_exact(example)
