"""Groups for tests of priors, without a model.

A layer with its bias, a grouped convolution without one, and a lone parameter registered first.
"""

import torch

from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.posterior.layouts import Layouts


def size(*shape):
    return torch.Size(shape)


PARAMS = ("position", "lin.weight", "lin.bias", "conv.weight")
LAYOUTS = Layouts(
    {
        "lin.weight": Layout(("lin.weight", "lin.bias"), (size(2, 3), size(2)), (1, 2, 4)),
        "conv.weight": Layout(("conv.weight",), (size(4, 1, 2),), (2, 2, 2)),
        "position": Layout(("position",), (size(3),), (1, 1, 3)),
    },
    PARAMS,
)
P = 3 + 6 + 2 + 8


def parameters(dtype=torch.float64, seed=0):
    """Random tensors by name."""
    torch.manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in LAYOUTS.shapes.items()
    }
