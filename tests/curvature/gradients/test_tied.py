"""Parameters used more than once: their uses count as more shared positions."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import N_DATA, Case
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_exact_blocks,
    assert_kfac_block,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn

SETTINGS = ("expand", "reduce")


class Tied(nn.Module):
    """Two modules, one weight; `bias` says which of them have a bias of their own."""

    def __init__(self, *bias: bool):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=bias[0])
        self.second = nn.Linear(3, 3, bias=bias[1])
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class OneModuleTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(self.first(x).tanh()).tanh())


class SharedBias(nn.Module):
    """Two weights, one bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.bias = self.first.bias
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class TiedAndLoose(nn.Module):
    """A weight under two names, once in a way that no rule covers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh())
        return self.head((h + x @ self.second.weight.square()).tanh())


class TiedEmbedding(nn.Module):
    """A language model in miniature: the head's weight is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(x)).tanh())


class Pyramid(nn.Module):
    """One convolution at two resolutions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).tanh()
        return self.head(h.mean((2, 3)) + self.conv(h).tanh().mean((2, 3)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_tied_weights_are_more_shared_positions(setting):
    """Two modules with one weight are one module used twice."""
    example = seeded_case(lambda: Tied(False, False))
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    assert curvature.coverage["first.weight"] == "kron"
    twin = OneModuleTwice().double()
    twin.load_state_dict(example.model.state_dict(), strict=False)
    assert torch.equal(twin(example.x), example.model(example.x))
    assert_kfac_block(Case(twin, "classification", example.batches), curvature, "first", setting)
    assert_dense_structures_are_exact(example)


def tied_factors(example: Case) -> oracles.Factors:
    """Reduce over the two uses of the tied weight, without its biases."""
    uses = [oracles.layer_tensors(example.model, m, *example.data) for m in ("first", "second")]
    mean = torch.cat([a for a, _ in uses], 1).mean(1)  # (n, 1, i)
    total = torch.cat([b for _, b in uses], 1).sum(1)  # (n, 1, o, k)
    hessian = oracles.output_hessian(example.model(example.x), example.y, example.likelihood)
    return oracles.Factors(
        torch.einsum("ngi,ngj->gij", mean, mean) / N_DATA,
        torch.einsum("ngok,nkl,ngpl->gop", total, hessian, total),
    )


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True)])
def test_tied_weights_with_biases_of_their_own(bias):
    """The weight's block sums over both uses; each bias has the block of its own use, exact."""
    example = seeded_case(lambda: Tied(*bias))
    curvature = fitted(example, kfac_approx="reduce")
    assert_complete(curvature, example.model)
    assert set(curvature.coverage.values()) == {"kron"}
    block = curvature.blocks["first.weight"]
    assert list(block.params) == ["first.weight"]
    want = oracles.kfac_block(tied_factors(example))
    assert relative_error(block.dense(), want) < EXACT
    for name in ("first.bias", "second.bias"):
        if name in curvature.coverage:
            exact = oracles.ggn(example.model, *example.data, [name])
            assert relative_error(curvature.blocks[name].dense(), exact) < EXACT
    assert_dense_structures_are_exact(example)


def test_a_bias_shared_by_two_layers_is_exact_under_reduce():
    example = seeded_case(SharedBias)
    curvature = fitted(example, kfac_approx="reduce")
    assert_complete(curvature, example.model)
    (block,) = [b for b in curvature.blocks.values() if "first.bias" in b.params]
    assert list(block.params) == ["first.bias"]
    exact = oracles.ggn(example.model, *example.data, ["first.bias"])
    assert relative_error(block.dense(), exact) < EXACT
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_shared_convolution_at_two_resolutions(setting):
    """Uses with different numbers of positions count as one pool of positions."""
    example = seeded_case(Pyramid, (2, 4, 4))
    curvature = fitted(example, kfac_approx=setting)
    assert_kfac_block(example, curvature, "conv", setting)
    assert_dense_structures_are_exact(example)


def test_a_tied_weight_with_one_loose_use_falls_to_the_diagonal():
    example = seeded_case(TiedAndLoose)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert_diagonal_blocks(example, curvature, ["first.weight"])
    assert_dense_structures_are_exact(example)


def test_a_tied_embedding_has_an_exact_block():
    """Lookups and products turn the table the other way round: no Kronecker product."""
    torch.manual_seed(4)
    model = TiedEmbedding().double()
    x, y = torch.randint(0, 5, (5, 3)), torch.randint(0, 5, (5, 3))
    example = Case(model, "classification", [(x[:3], y[:3]), (x[3:], y[3:])], setting="expand")
    curvature = fitted(example)
    assert_complete(curvature, model)
    assert curvature.coverage["embedding.weight"] == "dense"
    assert_exact_blocks(example, curvature, ["embedding.weight"])
    assert_kfac_block(example, curvature, "mix", "expand")
    assert_dense_structures_are_exact(example)
