"""The data sets, and where their files lie.

In the folder of `--data`:

* `mnist.npz`: `x_train` (60000, 28, 28), `y_train`, `x_test`, `y_test`, as Keras distributes it;
* `uci.npz`: for each set NAME/x (n, d), NAME/y (n,) and NAME/test_index (splits, m), padded with
  −1; the other rows train;
* `cifar10_train_jpeg.zip`, `cifar10_test_jpeg.zip`: members SPLIT/CLASS/NUMBER.jpg, 32 × 32.

The digits ship with scikit-learn. What was chosen by looking was chosen on MNIST's training images
from number 50,000 on, and on digits under seeds below 10.
"""

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace.demo.data import Split

#: Training images are drawn from those before this one.
LOOKED_AT = 50_000


class Images(NamedTuple):
    """Images to learn from and to test on, and two sets of others that neither is like.

    Args:
        train: grey images (n, 1, s, s) in [0, 1] with labels.
        test: likewise.
        other: digits of the other data set at the same size, or None without its file.
        patches: patches of photographs.
    """

    train: Split
    test: Split
    other: Tensor | None
    patches: Tensor


class MissingData(ValueError):
    """A data file is not there: no cell that needs it can run."""


def file_of(folder: Path | None, name: str) -> Path:
    """Path of a data file.

    Raises:
        MissingData: it is not there.
    """
    if folder is None or not (folder / name).exists():
        raise MissingData(
            f"{name} not found in {folder or 'no folder'}: name the folder by --data or by the "
            "environment variable KFAC_LAPLACE_DATA; benchmarks/experiments/data.py describes it"
        )
    return folder / name


@lru_cache(maxsize=1)
def read_mnist(folder: Path | None) -> tuple[Split, Split]:
    """MNIST as (n, 1, 28, 28) in [0, 1], training and test images."""
    with np.load(file_of(folder, "mnist.npz")) as file:
        return tuple(  # type: ignore[return-value]  # of two
            Split(
                torch.from_numpy(file[f"x_{part}"]).float()[:, None] / 255,
                torch.from_numpy(file[f"y_{part}"]).long(),
            )
            for part in ("train", "test")
        )


@lru_cache(maxsize=1)
def read_digits() -> Split:
    """The 1,797 digits as (n, 1, 8, 8) in [0, 1]."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    return Split(pixels, torch.tensor(raw.target))


def halved(x: Tensor) -> Tensor:
    """MNIST's 28 × 28 averaged to 14 × 14 in a frame of 16 × 16."""
    return F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1))


def like_digits(x: Tensor) -> Tensor:
    """The inner 20 × 20 of MNIST, where its digits are, averaged to the 8 × 8 that digits fill."""
    return F.adaptive_avg_pool2d(x[..., 4:24, 4:24], 8)


def like_mnist(x: Tensor) -> Tensor:
    """Digits at the size that MNIST's have when halved, in their frame of 16 × 16."""
    larger = F.interpolate(x, size=(10, 10), mode="bilinear", align_corners=False)
    return F.pad(larger, (3, 3, 3, 3))


def patches(count: int, side: int, seed: int) -> Tensor:
    """Grey patches (count, 1, side, side) in [0, 1], cut at random from two photographs."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    photographs = [
        torch.tensor(image).float().mean(-1) / 255 for image in load_sample_images().images
    ]
    found = []
    for which in torch.randint(len(photographs), (count,), generator=generator).tolist():
        grey, corner = photographs[which], torch.rand(2, generator=generator)
        row, column = (corner * (torch.tensor(grey.shape) - side + 1)).long().tolist()
        found.append(grey[row : row + side, column : column + side])
    return torch.stack(found)[:, None]


def images(data: str, size: int, seed: int, tests: tuple[int, int], folder: Path | None) -> Images:
    """Training and test images, which depend on data, size and seed alone.

    Args:
        data: "digits" or "mnist".
        size: number of training images.
        seed: of their choice, and of the patches.
        tests: most test images, and number of images of other kinds.
        folder: of mnist.npz; digits need it for the other set alone.
    """
    generator = torch.Generator().manual_seed(seed)
    few = tests[1]
    if data == "digits":
        whole = read_digits()
        order = torch.randperm(len(whole.y), generator=generator)
        train, rest = (Split(whole.x[i], whole.y[i]) for i in (order[:size], order[size:]))
        known = folder is not None and (folder / "mnist.npz").exists()
        other = like_digits(read_mnist(folder)[1].x[:few]) if known else None
    else:
        train, rest = read_mnist(folder)
        drawn = torch.randperm(min(LOOKED_AT, len(train.y)), generator=generator)[:size]
        train, rest = (
            Split(halved(train.x[drawn]), train.y[drawn]),
            Split(halved(rest.x[: tests[0]]), rest.y),
        )
        other = like_mnist(read_digits().x[:few])
    test = Split(rest.x[: tests[0]], rest.y[: tests[0]])
    return Images(train, test, other, patches(few, train.x.shape[-1], seed))


class Rows(NamedTuple):
    """A split of a regression set, standardised by its training rows.

    Args:
        train: features (n, d) and targets (n, 1).
        test: likewise.
        unit: standard deviation of the targets before.
    """

    train: Split
    test: Split
    unit: float


def uci(name: str, split: int, folder: Path | None) -> Rows:
    """A split of a UCI set by the protocol of Hernández-Lobato and Adams.

    Args:
        name: of a set in uci.npz.
        split: its number.
        folder: of the file.
    """
    with np.load(file_of(folder, "uci.npz")) as file:
        x, y, index = (file[f"{name}/{part}"] for part in ("x", "y", "test_index"))
    picked = index[split][index[split] >= 0]
    tested = np.isin(np.arange(len(y)), picked)
    x_scale, y_scale = x[~tested].std(0), float(y[~tested].std())
    x_scale[x_scale == 0] = 1.0  # a constant feature
    x = torch.tensor((x - x[~tested].mean(0)) / x_scale, dtype=torch.float32)
    y = torch.tensor((y - y[~tested].mean()) / y_scale, dtype=torch.float32)[:, None]
    rows = torch.from_numpy(tested)
    return Rows(Split(x[~rows], y[~rows]), Split(x[rows], y[rows]), y_scale)


@lru_cache(maxsize=2)
def cifar10(part: str, count: int, side: int, seed: int, folder: Path | None) -> Split:
    """CIFAR-10 from JPEG copies, which are lossy: (count, 3, side, side) in [0, 1], and labels.

    Args:
        part: "train" or "test".
        count: images, drawn at random.
        side: averaged down to this.
        seed: of the draw.
        folder: of the zip files.
    """
    from PIL import Image

    with ZipFile(file_of(folder, f"cifar10_{part}_jpeg.zip")) as file:
        members = sorted(name for name in file.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in members})
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
        picked = [members[index] for index in order[:count].tolist()]
        pixels = [
            np.asarray(Image.open(BytesIO(file.read(name))).convert("RGB")) for name in picked
        ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    labels = [classes.index(name.split("/")[-2]) for name in picked]
    return Split(F.adaptive_avg_pool2d(x, side), torch.tensor(labels))
