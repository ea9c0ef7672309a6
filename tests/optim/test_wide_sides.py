"""Of an input factor wider than the limit there is the diagonal alone."""

from __future__ import annotations

import pytest
import torch
from cases import build
from optim.captured import calm, capture, factors, negative_log_likelihood

from kfac_laplace.optim import KFAC, Estimate


def captured(name, fisher, setting, largest):
    example = build(name)
    found = capture(
        calm(example.model), example.likelihood, fisher, kfac_approx=setting, largest=largest
    )
    x, y = example.batches[0]
    (negative_log_likelihood(example.likelihood, example.model(x), y) / len(x)).backward()
    return factors(found.take())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "vit", "twice", "conv-2d-groups"])
def test_it_is_the_diagonal_of_the_factor(name, setting, fisher):
    whole, narrow = (captured(name, fisher, setting, largest) for largest in (4096, 3))
    wide = {key for key, (a, _) in whole.items() if a.shape[-1] > 3}
    assert wide
    for key, (a, b) in whole.items():
        its, other = narrow[key]
        torch.testing.assert_close(other, b, rtol=1e-12, atol=0)
        want = a.diagonal(dim1=-2, dim2=-1) if key in wide else a
        torch.testing.assert_close(its, want, rtol=1e-12, atol=0)


def test_averages_and_bases_take_it():
    example = build("cnn")
    optimizer = KFAC(example.model, example.likelihood, curvature=Estimate(every=1, largest=4))
    for _ in range(3):
        for x, y in example.batches:
            optimizer.zero_grad()
            negative_log_likelihood(example.likelihood, example.model(x), y).backward()
            optimizer.step()
    found = optimizer.curvature(7)
    for group in found.groups:
        assert group.diagonal == (group.layout.matrix[2] > 4)
        assert found.blocks[group.name].spectrum.values.shape == group.layout.matrix
