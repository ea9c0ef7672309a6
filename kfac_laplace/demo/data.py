"""Data that ships with scikit-learn: nothing is downloaded."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_diabetes, load_digits, load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

BMI = 2  # column of the body-mass index in the diabetes data


Batches = DataLoader[tuple[Tensor, ...]]


class Split(NamedTuple):
    """Inputs (n, ...) and targets (n,) or (n, 1)."""

    x: Tensor
    y: Tensor

    def cut(self, first: int) -> tuple["Split", "Split"]:
        """The first examples, and the others."""
        return Split(self.x[:first], self.y[:first]), Split(self.x[first:], self.y[first:])


class Images(NamedTuple):
    """Digits to learn from, digits to test on, and patches (n, 1, 8, 8) that are no digits."""

    train: Split
    test: Split
    ood: Tensor


class Scale(NamedTuple):
    """Mean and standard deviation of the training data."""

    mean: Tensor
    std: Tensor


class Patients(NamedTuple):
    """Standardised features (n, 10) and disease progression (n, 1), and the units they had."""

    train: Split
    test: Split
    x_scale: Scale
    y_scale: Scale


def digits(n_train: int, n_test: int, n_ood: int, seed: int, device: str = "cpu") -> Images:
    """A random split of the 1,797 digits, standardised by the training pixels.

    Args:
        n_train: training images.
        n_test: test images, or all that are left if those are fewer.
        n_ood: out-of-distribution patches.
        seed: seed of the split and of the patches' positions.
        device: where the tensors shall live.
    """
    generator = torch.Generator().manual_seed(seed)
    raw = load_digits()
    pixels = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16  # (n, 1, 8, 8) in [0, 1]
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(labels), generator=generator)
    train, rest = Split(pixels[order], labels[order]).cut(n_train)
    test, _ = rest.cut(n_test)
    mean, std = train.x.mean(), train.x.std()

    def ready(split: Split) -> Split:
        return Split(((split.x - mean) / std).to(device), split.y.to(device))

    ood = (patches(n_ood, generator) - mean) / std
    return Images(ready(train), ready(test), ood.to(device))


def patches(n: int, generator: torch.Generator) -> Tensor:
    """Grey 8x8 patches (n, 1, 8, 8) in [0, 1], cut at random from two photographs."""
    photographs = [
        torch.tensor(image).float().mean(-1) / 255 for image in load_sample_images().images
    ]
    which = torch.randint(len(photographs), (n,), generator=generator)
    corners = torch.rand(n, 2, generator=generator)
    found = []
    for index, corner in zip(which.tolist(), corners, strict=True):
        grey = photographs[index]
        row, column = (corner * (torch.tensor(grey.shape) - 7)).long().tolist()
        found.append(grey[row : row + 8, column : column + 8])
    return torch.stack(found)[:, None]


def diabetes(n_train: int, seed: int, device: str = "cpu") -> Patients:
    """A random split of the 442 patients, standardised by the training patients."""
    generator = torch.Generator().manual_seed(seed)
    raw = load_diabetes(scaled=False)
    features = torch.tensor(raw.data, dtype=torch.float32)
    progression = torch.tensor(raw.target, dtype=torch.float32)[:, None]
    order = torch.randperm(len(features), generator=generator)
    train, test = Split(features[order], progression[order]).cut(n_train)
    x_scale, y_scale = Scale(train.x.mean(0), train.x.std(0)), Scale(train.y.mean(), train.y.std())

    def ready(split: Split) -> Split:
        x = (split.x - x_scale.mean) / x_scale.std
        y = (split.y - y_scale.mean) / y_scale.std
        return Split(x.to(device), y.to(device))

    return Patients(ready(train), ready(test), x_scale, y_scale)


def loader(split: Split, batch_size: int, shuffle_seed: int | None = None) -> Batches:
    """Mini-batches, in order, or shuffled anew each epoch from a generator of their own."""
    generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)
    return DataLoader(
        TensorDataset(*split),
        batch_size=batch_size,
        shuffle=generator is not None,
        generator=generator,
    )
