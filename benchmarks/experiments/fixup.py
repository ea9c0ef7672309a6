"""Wide ResNets without norm layers: Fixup's initialisation and its scalars (Zhang et al., 2019)."""

import torch
from torch import Tensor, nn


class Shift(nn.Module):
    """x + b with one number b."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x + self.bias


class Block(nn.Module):
    """Pre-activation block of two convolutions; it starts as its shortcut.

    Args:
        i: channels that come in.
        o: channels that go out.
        stride: of the first convolution.
        blocks: how many the network has, by which Fixup scales the first convolution.
    """

    def __init__(self, i: int, o: int, stride: int, blocks: int):
        super().__init__()
        self.shift1, self.shift2, self.shift3, self.shift4, self.shift5 = (
            Shift() for _ in range(5)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if i == o else nn.Conv2d(i, o, 1, stride, bias=False)
        nn.init.normal_(self.conv1.weight, std=(2 / (9 * o)) ** 0.5 * blocks**-0.5)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, i, h, w) to (n, o, h / stride, w / stride)."""
        z = self.relu(self.shift1(x))
        kept = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(z)
        y = self.relu(self.shift3(self.conv1(self.shift2(z))))
        return kept + self.shift5(self.scale * self.conv2(self.shift4(y)))


class WideResNet(nn.Module):
    """WRN-16-k with Fixup, for images (n, 3, s, s): 2.75 M parameters at k = 4.

    Args:
        width: k.
        classes: outputs.
    """

    def __init__(self, width: int, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.stem.weight, mode="fan_out", nonlinearity="relu")
        blocks, channels = [], 16
        for stage in range(3):
            for place in range(2):
                o = 16 * width << stage
                blocks.append(Block(channels, o, 2 if stage and not place else 1, blocks=6))
                channels = o
        self.blocks = nn.Sequential(*blocks)
        self.shift, self.relu = Shift(), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(channels, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        x = self.relu(self.shift(self.blocks(self.stem(x))))
        return self.head(self.flatten(self.pool(x)))

    def scalars(self) -> list[nn.Parameter]:
        """Fixup's shifts and scales, which learn at a tenth of the rate."""
        return [parameter for parameter in self.parameters() if parameter.shape == (1,)]
