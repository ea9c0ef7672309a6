"""The networks of the image experiments, for grey images of 8 × 8 or 16 × 16 and ten classes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 10


def cnn(side: int, norm: bool = False, widths: tuple[int, ...] = (16, 32, 32)) -> nn.Module:
    """Three convolutions with average pooling and a linear head.

    Args:
        side: of the images.
        norm: batch norm after each convolution, which then has no bias.
        widths: channels.
    """
    layers: list[nn.Module] = []
    before = 1
    for place, width in enumerate(widths):
        layers.append(nn.Conv2d(before, width, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        if place == 1 or (place == 0 and side == 16):
            layers.append(nn.AvgPool2d(2))
        before = width
    pooled = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, CLASSES)]
    return nn.Sequential(*layers, *pooled)


def batch_norm_cnn(side: int) -> nn.Module:
    """The same with batch norm."""
    return cnn(side, norm=True)


class Block(nn.Module):
    """Pre-norm transformer block with torch's own attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens."""
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A micro-ViT the standard way: 16 patches, class token, learned positions of std 0.02."""

    def __init__(self, side: int, width: int = 32, heads: int = 4, depth: int = 2):
        super().__init__()
        patch = side // 4
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 17, width))
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, s, s) to logits."""
        tokens = self.embed(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def mlp(side: int, width: int = 64, depth: int = 2) -> nn.Module:
    """Fully connected layers with ReLU."""
    widths = [side * side, *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn": cnn,
    "batch-norm": batch_norm_cnn,
    "vit": VisionTransformer,
    "mlp": mlp,
}


def seeded(make: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """A network whose weights come from a seed, the same on every device.

    The global generator is as it was afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)
