"""Uses that no layer rule covers: the exact diagonal steps in, and nothing passes unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case, Pool
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_kfac_block,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

SETTINGS = ("expand", "reduce")


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


class Matmul(nn.Module):
    """A product that no layer rule covers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))
        self.gain = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.w).tanh()) * self.gain


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


class SelfAttention(nn.Module):
    """torch's own attention, batch first, for one output row an example."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Embedded(nn.Module):
    """Tokens through an embedding, a recurrent layer and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.recurrent = nn.GRU(3, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(x))[0][:, -1])


def test_a_transposed_use_falls_to_the_diagonal():
    example = seeded_case(Autoencoder, likelihood="regression")
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert_diagonal_blocks(example, curvature, ["encode.weight"])
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
    example = seeded_case(Matmul)
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
    if structure == "full":
        exact = oracles.ggn(example.model, *example.data, list(curvature.blocks["full"].params))
        assert relative_error(curvature.blocks["full"].dense(), exact) < EXACT
        return
    for name in idle:
        assert curvature.coverage[name] == "diag"
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


def test_multihead_attention_falls_to_the_diagonal():
    example = seeded_case(SelfAttention, (3, 4))
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    names = [n for n, _ in example.model.named_parameters() if n.startswith("attention.")]
    assert len(names) == 4
    assert_diagonal_blocks(example, curvature, names)


@pytest.mark.parametrize("setting", SETTINGS)
def test_embedding_and_recurrent_layers_fall_to_the_diagonal(setting):
    torch.manual_seed(4)
    model = Embedded().double()
    x = torch.randint(0, 5, (7, 3))
    y = torch.randint(0, 2, (7,))
    example = Case(model, "classification", [(x[:4], y[:4]), (x[4:], y[4:])])
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, model)
    names = [n for n, _ in model.named_parameters() if not n.startswith("head.")]
    assert_diagonal_blocks(example, curvature, names)


ACTIVE: dict[str, Callable[[], list[nn.Module]]] = {
    "group-norm": lambda: [nn.GroupNorm(2, 4)],
    "batch-norm": lambda: [nn.BatchNorm2d(4)],  # in evaluation mode
    "instance-norm": lambda: [nn.InstanceNorm2d(4, affine=True)],
    "prelu": lambda: [nn.PReLU()],  # torch's nested vmap differentiates it wrongly
    "prelu-by-channel": lambda: [nn.PReLU(4)],
    "transposed-conv": lambda: [nn.ConvTranspose2d(4, 4, 2)],
    "norm-then-prelu": lambda: [nn.BatchNorm2d(4), nn.PReLU()],
}


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("name", ACTIVE)
def test_layers_without_a_rule_fall_to_the_diagonal(name, outputs):
    """Several backward vectors at once (4 classes) and a single one (2 classes)."""

    def make() -> nn.Module:
        head = [Pool(2, 3), nn.Linear(4, outputs)]
        return nn.Sequential(nn.Conv2d(1, 4, 2), *ACTIVE[name](), nn.Tanh(), *head)

    example = seeded_case(make, (1, 4, 4))
    example.model.eval()  # the oracle sees what the curvature pass sees
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    head = f"{len(example.model) - 1}."
    names = [n for n, _ in example.model.named_parameters() if not n.startswith(("0.", head))]
    assert names
    assert_diagonal_blocks(example, curvature, names)
    assert_kfac_block(example, curvature, "0", "reduce")
    assert_dense_structures_are_exact(example)
