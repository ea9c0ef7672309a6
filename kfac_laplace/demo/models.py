"""Three small networks: a CNN without norm layers, a micro-ViT, and an MLP."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace.curvature.estimate.settings import KfacApprox


def cnn(classes: int = 10) -> nn.Module:
    """Three convolutions with average pooling (15,338 parameters), for inputs (n, 1, 8, 8).

    Pooling aggregates positions before the loss: a reduce setting.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, classes),
    )


class Attention(nn.Module):
    """Multi-head self-attention; its four projections are shared by all tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens of the same shape."""
        q, k, v = (self._split(projection(x)) for projection in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (n, heads, t, width / heads)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron, each with a shortcut.

    The norms have no gains of their own: a prior that pulls a gain to zero would switch its layer
    off.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MicroViT(nn.Module):
    """Vision transformer (17,322 parameters) for inputs (n, 1, 8, 8): 16 patches of 2x2 pixels.

    Mean pooling aggregates the tokens before the loss: a reduce setting.
    """

    position: Tensor

    def __init__(self, classes: int = 10, width: int = 32, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.register_buffer("position", waves(side=4, width=width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, classes)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position  # (n, 16, width)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def waves(side: int, width: int) -> Tensor:
    """Fixed position embeddings (side², width): sines and cosines of row and of column."""
    frequencies = math.pi * torch.arange(1, width // 4 + 1) / (width // 4)
    angles = (torch.arange(side) + 0.5)[:, None] * frequencies  # (side, width / 4)
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows = line[:, None].expand(side, side, -1)
    return 0.7 * torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)


def mlp(features: int, width: int = 50) -> nn.Module:
    """Two hidden layers and one real output, for inputs (n, features)."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 1),
    )


IMAGE_MODELS: dict[str, Callable[[], nn.Module]] = {"cnn": cnn, "vit": MicroViT}

# Softmax does not see a shift of all keys by one vector, so a key's gradients sum to zero over the
# tokens: K-FAC-reduce would give key projections no curvature at all. They take expand.
REDUCE: dict[str, KfacApprox] = {
    "cnn": "reduce",
    "vit": {"*attention.k*": "expand", "*": "reduce"},
}


def seeded(build: Callable[[], nn.Module], seed: int, device: str = "cpu") -> nn.Module:
    """A model whose initial weights depend on the seed alone; the global RNG stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    return model.to(device)
