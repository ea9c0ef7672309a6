"""Three small networks: a CNN without norm layers, a micro-ViT, and an MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    """Pre-norm transformer block: attention, then a two-layer perceptron, each with a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MicroViT(nn.Module):
    """Vision transformer (18,218 parameters) for inputs (n, 1, 8, 8): 16 patches of 2x2 pixels.

    Built the standard way [Dosovitskiy et al. 2021]: a class token that the head reads, a learned
    position embedding that begins at a standard deviation of 0.02, and norms with gains and shifts.
    """

    def __init__(self, classes: int = 10, width: int = 32, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 17, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, classes)."""
        patches = self.embed(x).flatten(2).transpose(1, 2)  # (n, 16, width)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


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


def seeded(build: Callable[[], nn.Module], seed: int, device: str = "cpu") -> nn.Module:
    """A model whose initial weights depend on the seed alone; the global RNG stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    return model.to(device)
