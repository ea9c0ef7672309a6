"""Batch norm by the statistics of the batch mixes the examples: refused, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Pool
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_same_blocks,
    dense_blocks,
    fitted,
    seeded_case,
)
from torch import Tensor, nn

from kfac_laplace.errors import UnsupportedUse


def image_case(*layers: nn.Module) -> Case:
    """convolution -> layers -> tanh -> pooling -> head, in evaluation mode."""

    def make() -> nn.Module:
        head = [nn.Tanh(), Pool(2, 3), nn.Linear(4, 3)]
        return nn.Sequential(nn.Conv2d(1, 4, 2), *layers, *head).eval()

    return seeded_case(make, (1, 4, 4))


class BatchStatistics(nn.Module):
    """Batch norm that ignores evaluation mode, as some meta-learning code calls it."""

    def __init__(self, affine: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4)) if affine else None
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.mean.clone(), self.variance.clone()
        return F.batch_norm(x, *statistics, self.weight, training=True)


class NativeBatchStatistics(nn.Module):
    """The same by `torch.batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


MIXING: dict[str, Callable[[], nn.Module]] = {
    "training": lambda: BatchStatistics(affine=True),
    "training-without-affine": lambda: BatchStatistics(affine=False),
    "native": NativeBatchStatistics,
    "no-running-statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no-running-statistics-without-affine": lambda: nn.BatchNorm2d(
        4, affine=False, track_running_stats=False
    ),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", MIXING)
def test_batch_statistics_are_refused(name, structure):
    example = image_case(MIXING[name]())
    with pytest.raises(UnsupportedUse, match="mixes the examples.*track_running_stats=True"):
        fitted(example, hessian_structure=structure)


@pytest.mark.parametrize("subset", ["last_layer", ["5.*"]])
def test_batch_statistics_are_refused_where_nothing_of_theirs_is_tracked(subset):
    norm = nn.BatchNorm2d(4, track_running_stats=False).requires_grad_(False)
    example = image_case(norm, nn.Identity())
    with pytest.raises(UnsupportedUse, match="mixes the examples"):
        fitted(example, subset_of_weights=subset)


def test_batch_norm_in_training_mode_is_put_in_evaluation_mode():
    """The pass runs in evaluation mode, so running statistics suffice."""
    example = image_case(nn.BatchNorm2d(4))
    want = fitted(example)
    example.model.train()
    got = fitted(example)
    assert_same_blocks(dense_blocks(got), dense_blocks(want), EXACT)


class StandardisedWeight(nn.Module):
    """A convolution whose weight is standardised by a call of batch norm: no example is mixed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 2, 2))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, 4, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape(self.weight.shape), self.bias)


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_of_a_weight_is_not_refused(frozen):
    layer = StandardisedWeight().requires_grad_(not frozen)
    example = image_case(layer)
    assert_complete(fitted(example), example.model)
    assert_dense_structures_are_exact(example)
