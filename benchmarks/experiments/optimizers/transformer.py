"""Transformers whose every product is an `nn.Linear`, so that peers which hook layers see all."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4


class Attention(nn.Module):
    """Self-attention with four heads.

    Args:
        width: of the tokens.
        causal: whether a token sees only those before it, and itself.
    """

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens."""
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (n, heads, t, width / heads)
            for layer in (self.query, self.key, self.value)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block: attention, then an MLP of twice the width."""

    def __init__(self, width: int, causal: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def positions(count: int, width: int) -> nn.Parameter:
    """Learned positions (1, t, width) of standard deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, width), std=0.02))


class VisionTransformer(nn.Module):
    """Patches of 4 × 4 (7 × 7 of sides that 7 divides), blocks, and the mean over tokens.

    Args:
        channels: of the images.
        side: of the images.
        width: of the tokens.
        depth: blocks.
        classes: outputs.
    """

    def __init__(self, channels: int, side: int, width: int, depth: int, classes: int = 10):
        super().__init__()
        patch = 7 if side % 7 == 0 else 4
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = positions((side // patch) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, c, s, s) to class scores."""
        tokens = self.embed(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class LanguageModel(nn.Module):
    """A small GPT: token and position embeddings, causal blocks, a head of its own.

    Args:
        tokens: size of the vocabulary.
        length: of a text.
        width: of the tokens.
        depth: blocks.
    """

    def __init__(self, tokens: int, length: int, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = positions(length, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Characters (n, t) to scores of the next (n, t, tokens)."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))
