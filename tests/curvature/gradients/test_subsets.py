"""Parts of a network trainable: frozen weights beside trained biases, globs, adapters, branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import oracles
import pytest
import torch
from cases import Case, Pool
from laws import (
    EXACT,
    Untouched,
    assert_complete,
    fitted,
    negligible,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.errors import InvalidValue


class First(nn.Module):
    """The first result of self-attention or of a recurrent network."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        attends = isinstance(self.module, nn.MultiheadAttention)
        return self.module(x, x, x)[0] if attends else self.module(x)[0]


class Tokens(nn.Embedding):
    """Looks up the tokens nearest to real inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x.abs() * 2).long().clamp_max(self.num_embeddings - 1))


# name: (layer with four outputs, shape of an example, axes of the output to pool over)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (3,), ()),
    "token linear": (lambda: nn.Linear(3, 4), (2, 3), (1,)),
    "conv": (lambda: nn.Conv2d(2, 4, 2), (2, 3, 3), (2, 3)),
    "grouped conv": (lambda: nn.Conv1d(4, 4, 2, groups=2), (4, 4), (2,)),
    "conv transpose": (
        lambda: nn.ConvTranspose1d(2, 4, 2, output_padding=1, stride=2),
        (2, 3),
        (2,),
    ),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4), (1,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3), (2,)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (4, 3), (2,)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 3), (2,)),
    "attention": (lambda: First(nn.MultiheadAttention(4, 2, batch_first=True)), (3, 4), (1,)),
    "cross attention": (
        lambda: First(nn.MultiheadAttention(4, 2, kdim=4, vdim=4, batch_first=True)),
        (3, 4),
        (1,),
    ),
    "lstm": (lambda: First(nn.LSTM(3, 4, batch_first=True)), (3, 3), (1,)),
    "embedding": (lambda: Tokens(5, 4), (3,), (1,)),
}


def layer_case(name: str) -> Case:
    """The layer, a nonlinearity, pooling and a head; no parameter is zero."""
    make, shape, axes = LAYERS[name]

    def model() -> nn.Module:
        network = nn.Sequential(make(), nn.Tanh(), Pool(*axes) if axes else nn.Identity())
        network.append(nn.Linear(4, 3))
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.7)
        return network

    example = seeded_case(model, shape)
    example.model.eval()  # the oracle runs batch norm with its running statistics, as a pass does
    return example


def frozen_sets(model: nn.Module) -> Iterator[list[str]]:
    """All ways to freeze some of the layer's parameters, at most three or all of them."""
    names = [name for name, _ in model[0].named_parameters(prefix="0")]
    for size in range(1, min(3, len(names)) + 1):
        yield from map(list, combinations(names, size))
    yield names


def part_of(block, params: tuple[str, ...], model: nn.Module) -> Tensor:
    """The rows and columns of some of a block's parameters."""
    sizes = [model.get_parameter(name).numel() for name in block.params]
    kept = [torch.full((n,), name in params) for name, n in zip(block.params, sizes, strict=True)]
    mask = torch.cat(kept)
    return block.dense()[mask][:, mask]


def expected(block, whole: Curvature, example: Case, structure: str) -> Tensor:
    """The exact block where the treatment is exact, else the part of the unfrozen network's."""
    if structure == "kron" and block.kind == "kron":
        (full,) = [b for b in whole.blocks.values() if block.params[0] in b.params]
        return part_of(full, block.params, example.model)
    exact = oracles.ggn(example.model, *example.data, list(block.params))
    return exact.diagonal().diag() if "diag" in (structure, block.kind) else exact


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", LAYERS)
def test_freezing_some_leaves_the_others_as_they_were(name, structure):
    """Frozen by flag or left out by name: the rest has the blocks that it has among all."""
    example = layer_case(name)
    model = example.model
    # joint_bias=False: a bias alone is one block, also where its weight comes in groups
    options = {"hessian_structure": structure, "joint_bias": False}
    whole = fitted(example, **options)
    for frozen in frozen_sets(model):
        kept = [n for n, _ in model.named_parameters() if n not in frozen]
        by_name = fitted(example, subset_of_weights=kept, **options)
        for parameter in frozen:
            model.get_parameter(parameter).requires_grad_(False)
        photograph = Untouched(model)
        by_flag = fitted(example, **options)
        photograph.check()
        assert_complete(by_flag, model)
        assert by_flag.coverage == by_name.coverage
        assert [n for n, kind in by_flag.coverage.items() if kind == "frozen"] == frozen
        for key, block in by_flag.blocks.items():
            want = expected(block, whole, example, structure)
            floor = negligible(whole)
            assert relative_error(block.dense(), want, floor) < EXACT, (frozen, key)
            assert relative_error(by_name.blocks[key].dense(), want, floor) < EXACT
        model.requires_grad_(True)


@pytest.mark.parametrize("name", ["conv", "layer norm", "attention", "lstm"])
def test_a_posterior_over_part_of_a_layer(name):
    """Evidence, predictions and samples of what is left, weights alone and biases alone."""
    example = layer_case(name)
    for kind in ("weight", "bias"):
        for parameter, tensor in example.model[0].named_parameters():
            tensor.requires_grad_(kind in parameter)
        la = Laplace(example.model, example.likelihood).fit(example.batches)
        dense = [block.dense() for block in la.curvature.blocks.values()]
        ratio = sum(torch.linalg.slogdet(h + torch.eye(len(h))).logabsdet for h in dense)
        torch.testing.assert_close(la.log_det_ratio, ratio)
        size = sum(p.numel() for p in example.model.parameters() if p.requires_grad)
        assert la.sample(2).shape == (2, size)
        assert la(example.x).shape == (7, 3)
        assert la.optimize_prior().calibrate().posterior_scale >= 0


class Branches(nn.Module):
    """Two branches of which one may be frozen, and a head that is never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.first = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        return self.head(self.first(h) + self.second(h))


@pytest.mark.parametrize("frozen", [["first"], ["stem", "second"], ["first", "second", "head"]])
def test_nothing_trainable_in_a_branch(frozen):
    example = seeded_case(Branches)
    whole = fitted(example)
    for name in frozen:
        example.model.get_submodule(name).requires_grad_(False)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    left = [n for n, kind in curvature.coverage.items() if kind == "frozen"]
    assert {n.split(".")[0] for n in left} == set(frozen)
    for key, block in curvature.blocks.items():
        assert relative_error(block.dense(), whole.blocks[key].dense()) < EXACT
    assert not curvature.blocks["unused.weight"].dense().any()


def test_a_posterior_of_nothing_is_refused():
    """The output ignores all that is trainable: what is fitted then is a mistake."""
    example = seeded_case(Branches)
    example.model.requires_grad_(False).unused.requires_grad_(True)
    with pytest.raises(InvalidValue, match=r"unused\.weight.*no parameter has an effect"):
        Laplace(example.model, example.likelihood).fit(example.batches)
