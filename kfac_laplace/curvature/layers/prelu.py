"""Learned slopes of rectifiers."""

import torch
from torch import Tensor

from kfac_laplace.curvature.layers.entries import scaled
from kfac_laplace.curvature.layers.registry import Layer, layer_rule
from kfac_laplace.curvature.linalg.dtypes import accumulable


@layer_rule(torch.prelu, Tensor.prelu)
def prelu(output: Tensor, input: Tensor, weight: Tensor) -> Layer | None:
    """max(x, 0) + w · min(x, 0), with one slope w or one for each channel (axis 1)."""
    below = accumulable(input.detach()).clamp(max=0)
    return scaled(weight, None, input, below, [1] if weight.numel() > 1 else [])
