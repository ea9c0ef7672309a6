"""Tables looked up at constant places: exact blocks, repeated over the examples or not."""

from __future__ import annotations

import pytest
import torch
from laws import assert_dense_structures_are_exact, assert_diagonal_blocks, fitted, seeded_case
from torch import Tensor, nn


class TokenTypes(nn.Module):
    """A table looked up at constant places, repeated over the examples or not."""

    def __init__(self, repeat: bool):
        super().__init__()
        self.types, self.head = nn.Embedding(3, 3, padding_idx=1), nn.Linear(3, 2)
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([[0, 1, 2, 2]])
        types = self.types(index.expand(len(x), -1) if self.repeat else index)
        return self.head((x + types).tanh().mean(1))


@pytest.mark.parametrize("repeat", [True, False])
def test_constant_lookups_have_exact_blocks_repeated_or_not(repeat):
    """As BERT fills its token types in; batches of one example fit in with the others."""
    example = seeded_case(lambda: TokenTypes(repeat), (4, 3))
    curvature = fitted(example)
    assert {group.role for group in curvature.groups} == {"exact", "joint"}
    assert_diagonal_blocks(example, curvature, ["types.weight"])
    assert_dense_structures_are_exact(example)
