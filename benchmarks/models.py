"""The networks that all contenders are measured on, with inputs that fit them.

Modules are called, never bypassed, and projections are plain `nn.Linear`, so that contenders that
work by hooks see every layer.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What the scaling suite varies; 0 stands for the network's own size.

    Args:
        width: hidden units, channels of the first stage, or width of a token.
        depth: hidden layers, or blocks.
        tokens: patches and class token, or nodes of a graph.
    """

    width: int = 0
    depth: int = 0
    tokens: int = 0

    def given(self) -> dict[str, int]:
        """The sizes that are set."""
        return {name: value for name, value in asdict(self).items() if value}


def mlp(classes: int, width: int = 512, depth: int = 2) -> nn.Module:
    """784-512-512-10 with ReLU, for inputs (n, 784)."""
    widths = [784, *[width] * depth]
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class Residual(nn.Module):
    """Pre-activation block of two convolutions; a constant holds the variance, not a norm."""

    def __init__(self, i: int, o: int, stride: int, scale: float):
        super().__init__()
        self.scale = scale
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1)
        self.shortcut = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, i, h, w) to (n, o, h / stride, w / stride)."""
        y = self.conv2(self.relu2(self.conv1(self.relu1(x))))
        return self.shortcut(x) + self.scale * y


class WideResNet(nn.Module):
    """WRN-16-4 without norm layers (2.75 M parameters), for inputs (n, 3, 32, 32) [KFAC23]."""

    def __init__(self, classes: int, width: int = 64, depth: int = 2):
        super().__init__()
        scale = (3 * depth) ** -0.5
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        blocks, channels = [], 16
        for stage in range(3):
            for k in range(depth):
                stride = 2 if stage and not k else 1
                blocks.append(Residual(channels, width << stage, stride, scale))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.relu, self.pool, self.flatten = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, 32, 32) to logits (n, classes)."""
        return self.head(self.flatten(self.pool(self.relu(self.blocks(self.stem(x))))))


def resnet18(classes: int) -> nn.Module:
    """torchvision's ResNet-18 in evaluation mode, for inputs (n, 3, 32, 32)."""
    from torchvision.models import resnet18

    return resnet18(num_classes=classes).eval()


class Attention(nn.Module):
    """Multi-head self-attention with four plain projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens of the same shape."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # (n, heads, t, width / heads)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width) to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer on patches (n, t − 1, 48) of images, mean-pooled: a reduce setting.

    A head on the class token alone would leave rows of the last block without influence, which
    contenders treat differently; here all of them do the same work.
    """

    def __init__(self, classes: int, width: int = 192, depth: int = 4, tokens: int = 65):
        super().__init__()
        self.embed = nn.Linear(48, width)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Patches (n, t − 1, 48) to logits (n, classes)."""
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return self.head(self.norm(self.blocks(tokens + self.position)).mean(1))


class GraphNetwork(nn.Module):
    """Graph convolutions over dense adjacencies, mean-pooled: one label for each graph.

    Input (n, t, 16 + t): features of the t nodes, then the rows of the adjacency.
    """

    def __init__(self, classes: int, width: int = 128, depth: int = 3):
        super().__init__()
        widths = [16, *[width] * depth]
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Graphs (n, t, 16 + t) to logits (n, classes)."""
        nodes, adjacency = x[..., :16], x[..., 16:]
        for layer in self.layers:
            nodes = layer(adjacency @ nodes).relu()
        return self.head(nodes.mean(1))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "wrn": WideResNet,
    "resnet18": resnet18,
    "vit": ViT,
    "gnn": GraphNetwork,
}
WITH_NORMS = ("resnet18", "vit")


def build(network: str, classes: int, size: Size) -> nn.Module:
    """A network with seeded weights."""
    given = size.given()
    if network == "gnn":
        given.pop("tokens", None)  # as many as its input has
    torch.manual_seed(0)
    return NETWORKS[network](classes, **given)


def draw(network: str, examples: int, classes: int, size: Size) -> tuple[Tensor, Tensor]:
    """Seeded inputs (n, ...) and labels (n,); timings depend on their shapes alone."""
    torch.manual_seed(1)
    y = torch.randint(classes, (examples,))
    if network == "mlp":
        return torch.randn(examples, 784), y
    if network == "vit":
        return torch.randn(examples, (size.tokens or 65) - 1, 48), y
    if network == "gnn":
        nodes = size.tokens or 32
        edges = (torch.rand(examples, nodes, nodes) < 4 / nodes).float() + torch.eye(nodes)
        features = torch.randn(examples, nodes, 16)
        return torch.cat([features, edges / edges.sum(-1, keepdim=True)], -1), y
    return torch.randn(examples, 3, 32, 32), y


def freeze_all_but_linear_layers(model: nn.Module) -> int:
    """Leave `nn.Linear` and `nn.Conv2d` alone trainable; returns how many parameters froze."""
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    }
    frozen = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)
