"""Linear layers: y = W x + b over any number of leading axes."""

import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.curvature.layers.registry import Layer, layer_rule
from kfac_laplace.curvature.rows.inputs import Rows


@layer_rule(F.linear)
def linear(
    output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Layer | None:
    """The weight gradient is Σ_t g_t x_tᵀ: rows are the last axis of input and output."""
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return None  # a vector of weights, a bias that is broadcast
    if input.ndim == 1:
        input = input[None]
    return Layer(
        weight=weight,
        bias=bias,
        matrix=(1, *weight.shape),
        data=(input,),
        inputs=Rows(input.detach()[None]),  # (1, *lead, i)
        output_rows=lambda grad: grad.reshape(grad.shape[0], 1, *input.shape[:-1], len(weight)),
    )
