"""Data files of the right layout with made-up content, so that no test waits for a download."""

from __future__ import annotations

from io import BytesIO
from zipfile import ZipFile

import numpy as np


def write_mnist(folder, train=60, test=40):
    """Images whose class is where their bright bar lies."""
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", train), ("test", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 6 + 2 * label, 4:24] = 255
        content |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(folder / "mnist.npz", **content)


def write_uci(folder, name="yacht", rows=60, splits=2):
    """A linear target with noise; test rows are padded with −1, as in sets of uneven splits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3)) * 5 + 2
    x[:, 2] = 1.0  # a constant feature
    index = np.stack([rng.permutation(rows)[:7] for _ in range(splits)])
    index[:, -1] = -1
    y = 3 * x[:, 0] - x[:, 1] + rng.normal(size=rows)
    np.savez(folder / "uci.npz", **{f"{name}/x": x, f"{name}/y": y, f"{name}/test_index": index})


def write_cifar(folder, each=4):
    """Ten classes of grey images, the brighter the later."""
    from PIL import Image

    for part in ("train", "test"):
        with ZipFile(folder / f"cifar10_{part}_jpeg.zip", "w") as file:
            for label in range(10):
                for number in range(each):
                    image, content = Image.new("RGB", (32, 32), (25 * label,) * 3), BytesIO()
                    image.save(content, "JPEG")
                    file.writestr(f"{part}/class{label}/{number:04d}.jpg", content.getvalue())
