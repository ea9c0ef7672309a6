"""Layer rules that contradict themselves are refused by name, not by what LAPACK makes of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Curvature, layer_rule
from kfac_laplace.curvature.layers import RULES, Layer, Rows
from kfac_laplace.errors import UnsupportedUse


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(x, self.weight)


def right(output: Tensor, input: Tensor, weight: Tensor) -> Layer:
    return Layer(
        weight=weight,
        bias=None,
        matrix=(1, 3, 4),
        data=(input,),
        inputs=Rows(input.detach()[None]),
        output_rows=lambda grad: grad[:, None],
    )


@pytest.fixture
def registered():
    """Register a rule for `torch.inner`, and forget it afterwards."""

    def register(**wrong) -> None:
        layer_rule(torch.inner)(lambda *args: dataclasses.replace(right(*args), **wrong))

    yield register
    RULES.pop(torch.inner, None)


def fit() -> Curvature:
    x = torch.randn(5, 4, dtype=torch.float64)
    return Curvature(Inner(), "classification").fit([(x, torch.tensor([0, 1, 2, 0, 1]))])


def test_the_right_one_is_taken(registered):
    registered()
    assert fit().coverage == {"weight": "kron"}


def test_matrices_of_another_size(registered):
    registered(matrix=(1, 3, 5))
    with pytest.raises(UnsupportedUse, match="weight: .*another size.*3, 4"):
        fit()


def test_output_rows_of_another_width(registered):
    registered(matrix=(1, 4, 3))
    with pytest.raises(UnsupportedUse, match="another width"):
        fit()
