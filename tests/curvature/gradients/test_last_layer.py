"""The last layer is found by use: the last one that reaches the output, and no scale behind it."""

from __future__ import annotations

import torch
from cases import build
from laws import fitted, seeded_case
from torch import Tensor, nn

from kfac_laplace import Curvature


class AuxiliaryHead(nn.Module):
    """The head used last in time does not reach the output."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        outputs = [self.head(h), self.auxiliary(h)]
        return outputs[0]


def test_the_last_layer_reaches_the_output():
    curvature = fitted(seeded_case(AuxiliaryHead), subset_of_weights="last_layer")
    assert list(curvature.params) == ["head.weight", "head.bias"]


class ScaledLogits(nn.Sequential):
    """A network whose logits pass through a learned temperature and a shift."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x) * self.scale + self.shift


def test_the_last_layer_is_a_layer_and_no_scale_behind_it():
    case = build("mlp-tanh")
    model = ScaledLogits().double()
    curvature = Curvature(model, "classification", subset_of_weights="last_layer")
    curvature.fit(case.batches)
    assert list(curvature.params) == ["2.weight", "2.bias"]
