"""What a curvature keeps can be pickled, differentiated and predicted with later."""

from __future__ import annotations

import pickle

import pytest
import torch
from laws import relative_error
from torch import Tensor, nn

from kfac_laplace import Laplace


class Flat(torch.autograd.Function):
    """The identity; its derivative means the order of gradients in memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view(len(gradient), -1).reshape(gradient.shape) * 1.0


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(Flat.apply(self.first(x).tanh())).tanh()
        return self.head(h.mean((2, 3)))


def test_derivatives_in_python_keep_their_order_after_batches_of_one():
    """Nothing is reordered in batches of one; a larger batch comes with the prediction."""
    torch.manual_seed(0)
    model, x, y = Images(), torch.randn(8, 2, 7, 7), torch.arange(8) % 3
    la = Laplace(model, "classification").fit([(x[k : k + 1], y[k : k + 1]) for k in range(8)])
    alone = torch.cat([la(x[k : k + 1]) for k in range(8)])
    assert relative_error(la(x), alone) < 1e-5  # float32


def normed() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    return model, torch.randn(9, 3).double(), torch.arange(9) % 3


def test_a_used_posterior_with_a_dense_block_can_be_pickled():
    model, x, y = normed()
    la = Laplace(model, "classification").fit([(x, y)])
    want = la.log_marginal_likelihood(), la(x)
    again = pickle.loads(pickle.dumps(la))
    torch.testing.assert_close(again.log_marginal_likelihood(), want[0])
    torch.testing.assert_close(again(x), want[1])


@pytest.mark.parametrize("index", [0, 1])
def test_bases_made_in_inference_mode_serve_outside(index):
    """Of a Kronecker and of a dense block."""
    model, x, y = normed()
    la = Laplace(model, "classification").fit([(x, y)])
    block = [*la.curvature.blocks.values()][index]
    with torch.inference_mode():
        left, right = block.spectrum.bases
    assert not left.is_inference() and not right.is_inference()
