"""Splits and images: what trains is not tested on, and nothing depends on the method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from experiments.made_up import write_cifar, write_mnist, write_uci

from benchmarks.experiments.augmentation import augmented, flipped_and_cropped, moved
from benchmarks.experiments.data import MissingData, cifar10, images, read_digits, uci
from benchmarks.experiments.measures import auroc
from benchmarks.experiments.problem import best_temperature


def test_digits_are_split_without_overlap():
    """Every digit is in one part; a larger training set contains the smaller one."""
    small, large = (images("digits", size, 11, (10_000, 20), None) for size in (100, 300))
    assert torch.equal(small.train.x, large.train.x[:100])
    both = torch.cat([small.train.x, small.test.x]).flatten(1)
    order, whole = both.sum(1).sort().values, read_digits().x.flatten(1).sum(1).sort().values
    assert torch.equal(order, whole)
    assert small.other is None and small.patches.shape == (20, 1, 8, 8)
    other = images("digits", 100, 12, (10_000, 20), None)
    assert not torch.equal(small.train.x, other.train.x)


def test_mnist_is_averaged_to_a_frame(tmp_path):
    write_mnist(tmp_path)
    found = images("mnist", 30, 0, (25, 7), tmp_path)
    assert found.train.x.shape == (30, 1, 16, 16) and found.test.x.shape == (25, 1, 16, 16)
    assert found.other.shape == found.patches.shape == (7, 1, 16, 16)
    frame = found.train.x.clone()
    frame[..., 1:15, 1:15] = 0
    assert frame.abs().max() == 0
    with np.load(tmp_path / "mnist.npz") as file:
        first = file["x_test"][0].reshape(14, 2, 14, 2).mean((1, 3)) / 255
    assert np.allclose(found.test.x[0, 0, 1:15, 1:15], first, atol=1e-6)


def test_uci_is_standardised_by_its_training_rows(tmp_path):
    write_uci(tmp_path)
    rows = uci("yacht", 1, tmp_path)
    assert (len(rows.train.y), len(rows.test.y)) == (54, 6)  # of 7 test places one is padding
    assert rows.train.x[:, :2].mean(0).abs().max() < 1e-6
    assert rows.train.x[:, :2].std(0, correction=0) == pytest.approx(1, abs=1e-5)
    assert rows.train.x[:, 2].abs().max() == 0  # the constant feature
    assert rows.train.y.std(correction=0) == pytest.approx(1, abs=1e-5)
    with pytest.raises(MissingData, match="uci.npz not found in no folder"):
        uci("yacht", 0, None)


def test_cifar_has_its_labels(tmp_path):
    write_cifar(tmp_path)
    found = cifar10("train", 30, 8, 0, tmp_path)
    assert found.x.shape == (30, 3, 8, 8)
    assert torch.allclose(found.x.mean((1, 2, 3)) * 255 / 25, found.y.float(), atol=0.2)


def test_moved_images():
    """No motion is the identity; a quarter turn is torch's; a shift by a pixel is by one."""
    x, zero = torch.rand(2, 1, 6, 6), torch.zeros(2)
    assert torch.allclose(moved(x, zero, zero, zero), x, atol=1e-6)
    quarter = torch.full((2,), math.pi / 2)
    assert torch.allclose(moved(x, quarter, zero, zero), x.rot90(1, (2, 3)), atol=1e-5)
    shifted = moved(x, zero, torch.full((2,), 2 / 6), zero)
    assert torch.allclose(shifted[..., :-1], x[..., 1:], atol=1e-5)
    assert shifted[..., -1].abs().max() < 1e-5


def test_augmentation_is_that_of_its_generator():
    x = torch.rand(4, 3, 8, 8)
    for change in (augmented, flipped_and_cropped):
        draws = [change(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
        assert draws[0].shape == x.shape
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_crops_are_parts_of_framed_mirrored_images():
    """Each result is found among all places of the image and of its mirror image."""
    x = torch.rand(8, 2, 8, 8)
    found = flipped_and_cropped(x, torch.Generator().manual_seed(0))
    framed = torch.nn.functional.pad(x, (1, 1, 1, 1))
    mirrored = 0
    for image, result in zip(framed, found, strict=True):
        places = [image[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        straight = any(torch.equal(place, result) for place in places)
        mirrored += any(torch.equal(place.flip(-1), result) for place in places)
        assert straight or any(torch.equal(place.flip(-1), result) for place in places)
    assert 0 < mirrored < 8


def test_auroc_counts_pairs():
    inside, outside = torch.tensor([0.0, -3.0, 7.0]), torch.tensor([7.0, 8.0])
    # of six pairs five are in order, and the tie is half a one
    assert auroc(inside, outside) == pytest.approx(5.5 / 6)


def test_the_temperature_is_where_the_likelihood_is_flat():
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, 4, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    best = best_temperature(logits, labels)
    around = [
        float(torch.nn.functional.cross_entropy(logits / (best * step), labels))
        for step in (0.99, 1.0, 1.01)
    ]
    assert around[1] < min(around[0], around[2])
    assert best == pytest.approx(2.5, rel=0.3)
