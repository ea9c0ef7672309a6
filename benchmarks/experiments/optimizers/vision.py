"""MNIST and CIFAR-10 (JPEG copies, which are lossy), and convolutional networks for them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from benchmarks.experiments.augmentation import flipped_and_cropped
from benchmarks.experiments.data import LOOKED_AT, cifar10, halved, read_mnist
from benchmarks.experiments.optimizers.task import Data, Rows, Size
from benchmarks.experiments.optimizers.transformer import VisionTransformer
from kfac_laplace.demo.data import Split

#: Images of CIFAR-10 smaller than this are trained on as they are, the others augmented.
AUGMENTED_FROM = 32


def mnist(size: Size, device: str, folder: Path | None) -> Data:
    """Digits of 28 × 28, or of 16 × 16 (halved, in a frame); validated on training images."""
    if size.side not in (16, 28):
        raise ValueError(f"MNIST comes at sides of 16 and 28, not {size.side}")
    train, test = read_mnist(folder)
    few = min(LOOKED_AT, len(train.y))
    drawn = torch.randperm(few, generator=Generator().manual_seed(0))[: size.train]
    # a file of fewer images than MNIST's own: validate on those not drawn
    others = [k for k in range(few, len(train.y))] or sorted(set(range(few)) - set(drawn.tolist()))
    rest = torch.tensor(others)[: size.held_out]
    parts = [
        Split(train.x[drawn], train.y[drawn]),
        Split(train.x[rest], train.y[rest]),
        test.cut(size.held_out)[0],
    ]
    return Data(
        *(
            Rows((halved(x) if size.side == 16 else x).to(device), y.to(device))
            for x, y in (tuple(part) for part in parts)
        )
    )


def cifar(size: Size, device: str, folder: Path | None) -> Data:
    """Images standardised by channel; at full size mirrored and cropped at random in training."""
    drawn = cifar10("train", size.train + size.held_out, size.side, 0, folder)
    held_out = min(size.held_out, len(drawn.y) // 2)
    validation, train = drawn.cut(held_out)
    test = cifar10("test", size.held_out, size.side, 0, folder)
    mean, std = (getattr(train.x, name)((0, 2, 3), keepdim=True) for name in ("mean", "std"))
    found = [
        Rows(((part.x - mean) / std).to(device), part.y.to(device))
        for part in (train, validation, test)
    ]
    if size.side >= AUGMENTED_FROM:
        found[0] = Rows(found[0].x, found[0].y, flipped_and_cropped)
    return Data(*found)


def mnist_transformer(size: Size) -> nn.Module:
    """A micro-ViT for grey images."""
    return VisionTransformer(1, size.side, size.width, size.depth)


def cifar_transformer(size: Size) -> nn.Module:
    """A ViT for colour images."""
    return VisionTransformer(3, size.side, size.width, size.depth)


def convolutions(size: Size) -> nn.Module:
    """3 × 3 convolutions without norms, the second half of twice the width, and a mean over places.

    Kaiming's initialisation; the map is halved after each half.
    """
    layers: list[nn.Module] = []
    before = 3
    for place in range(size.depth):
        after = size.width * (2 if 2 * place >= size.depth else 1)
        convolution = nn.Conv2d(before, after, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]  # it has one
        layers += [convolution, nn.ReLU()]
        if (place + 1) % max(1, size.depth // 2) == 0:
            layers.append(nn.AvgPool2d(2))
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Residual(nn.Module):
    """Two convolutions with batch norms beside a shortcut (He et al., 2016)."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or i != o:
            projection = nn.Conv2d(i, o, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, i, h, w) to (n, o, h / stride, w / stride)."""
        z = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(z)))


def resnet(size: Size) -> nn.Module:
    """ResNet-18's four stages of `depth` (2) blocks on a 3 × 3 stem, of `width` (64) channels."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, size.width, 3, padding=1, bias=False),
        nn.BatchNorm2d(size.width),
        nn.ReLU(),
    ]
    before = size.width
    for stage in range(4):
        for place in range(size.depth):
            after = size.width << stage
            layers.append(Residual(before, after, 2 if stage and not place else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
