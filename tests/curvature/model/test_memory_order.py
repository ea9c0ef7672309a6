"""Models that mean the order of their tensors in memory are run in it, and fail as they would."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from laws import assert_same_blocks, dense_blocks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_laplace import Curvature

# Products of float32 numbers, a few layers deep: their rounding errors add up to some tens of eps.
SINGLE = 1e-5
CHANNELS, CLASSES, SIDE = 8, 3, 6
FEATURES = CHANNELS * SIDE**2

Wire = Callable[["Images", Tensor], Tensor]


class Images(nn.Module):
    """A convolution and a head; a function puts them together."""

    def __init__(self, wire: Wire, features: int = FEATURES):
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.head = nn.Linear(features, CLASSES)
        self._wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self._wire(self, x)


def in_line(m: Images, x: Tensor) -> Tensor:
    return m.head(m.first(x).tanh().mean((2, 3)))


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, SIDE, SIDE), torch.arange(n) % CLASSES


def assert_same_in_double(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> Curvature:
    """The same blocks as those of the float64 model, whose convolutions are left alone."""
    exact = Curvature(copy.deepcopy(model).double(), "classification")
    exact.fit([(x.double(), y) for x, y in batches])
    curvature = Curvature(model, "classification").fit([(x.clone(), y) for x, y in batches])
    blocks = {name: block.double() for name, block in dense_blocks(curvature).items()}
    assert_same_blocks(blocks, dense_blocks(exact), SINGLE)
    return curvature


def flattened_by_view(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.head(h.view(len(h), -1))


def flattened_in_a_checkpoint(m: Images, x: Tensor) -> Tensor:
    return m.head(checkpoint(lambda x: m.first(x).tanh().view(len(x), -1), x, use_reentrant=False))


def strided(m: Images, x: Tensor) -> Tensor:
    """All of an example, one place in memory after another."""
    h = m.first(x).tanh()
    return m.head(h.as_strided((len(h), FEATURES), (FEATURES, 1)))


def strided_by_function(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.head(torch.as_strided(h, (len(h), FEATURES), (FEATURES, 1)))


def strided_by_keywords(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.head(torch.as_strided(input=h, size=(len(h), FEATURES), stride=(FEATURES, 1)))


def flattened_as_another(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.head(h.view_as(h.new_empty(len(h), FEATURES)))


def complex_pairs(m: Images, x: Tensor) -> Tensor:
    """Neighbours along the last axis are real and imaginary parts: they must lie side by side."""
    h = torch.view_as_complex(m.first(x).unflatten(-1, (-1, 2)))
    return m.head(torch.cat([h.abs(), h.abs().sqrt()], -1).flatten(1))


def insists(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    assert h.is_contiguous()
    return m.head(h.flatten(1))


def complains(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    if not h.is_contiguous():
        raise ValueError("contiguous tensors only")
    return m.head(h.flatten(1))


class Flat(torch.autograd.Function):
    """The identity, with a derivative that flattens by `view`."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.view(-1).view(gradient.shape)


def flattened_gradients(m: Images, x: Tensor) -> Tensor:
    """The gradient is that of a convolution's input."""
    h = Flat.apply(m.first(x))
    return m.head(
        nn.functional.conv2d(h, m.first.weight.new_ones(CHANNELS, CHANNELS, 1, 1)).sin().flatten(1)
    )


def flattened_by_a_hook(m: Images, x: Tensor) -> Tensor:
    """The model's own code in the backward pass, on the gradient of a convolution's input."""
    h = m.first(x).tanh()
    h.register_hook(lambda gradient: gradient.view(-1).view(gradient.shape))
    return m.head(
        nn.functional.conv2d(h, m.first.weight.new_ones(CHANNELS, CHANNELS, 1, 1)).sin().flatten(1)
    )


def shifted_in_place(m: Images, x: Tensor) -> Tensor:
    """Runs twice on other inputs if the first attempt is given up."""
    x -= 0.5
    return flattened_by_view(m, x)


def scaled_by_strides(m: Images, x: Tensor) -> Tensor:
    h = m.first(x).tanh()
    return m.head(h.flatten(1) * h.stride(1) / SIDE**2)


BY_MEMORY = (
    flattened_by_view,
    flattened_in_a_checkpoint,
    strided,
    strided_by_function,
    scaled_by_strides,
    strided_by_keywords,
    flattened_as_another,
    complex_pairs,
    insists,
    complains,
    flattened_gradients,
    flattened_by_a_hook,
    shifted_in_place,
)


@pytest.mark.parametrize("wire", BY_MEMORY, ids=lambda wire: wire.__name__)
def test_models_that_mean_the_order_in_memory_keep_it(wire):
    model = Images(wire)
    curvature = assert_same_in_double(model, batch(5), batch(4), batch(1), batch(3))
    assert not curvature.ggn.knowledge.reorders


def test_errors_of_the_model_arrive_and_leave_the_curvature_as_it_was():
    class Broken(Exception):
        pass

    errors = [RuntimeError("no"), Broken(), ValueError("no")]

    def breaks(m: Images, x: Tensor) -> Tensor:
        output = in_line(m, x)
        if len(x) == 2:
            raise errors[0]
        return output

    model = Images(breaks, CHANNELS)
    good, bad = batch(3), batch(2)
    curvature = Curvature(model, "classification").fit([good])
    before, known = dense_blocks(curvature), curvature.ggn.knowledge.reorders
    while errors:
        with pytest.raises(type(errors[0])) as caught:
            curvature.accumulate(*bad)
        assert caught.value is errors.pop(0)
        assert_same_blocks(dense_blocks(curvature), before, 0)
        assert curvature.n_data == 3 and curvature.ggn.knowledge.reorders is known is True


def test_a_view_that_fits_no_order_is_the_models_error():
    def wrong(m: Images, x: Tensor) -> Tensor:
        return m.head(m.first(x).view(len(x), 7))

    with pytest.raises(RuntimeError, match="shape '\\[5, 7\\]' is invalid"):
        Curvature(Images(wrong, 7), "classification").fit([batch(5)])


@pytest.mark.parametrize(
    ("wire", "features", "order"),
    [
        (in_line, CHANNELS, torch.contiguous_format),
        (in_line, CHANNELS, torch.channels_last),
        (flattened_by_view, FEATURES, torch.contiguous_format),
    ],
)
def test_the_callers_images_stay_as_they_are(wire, features, order):
    x, y = batch(4)
    x = x.contiguous(memory_format=order)
    before, strides, place = x.clone(), x.stride(), x.data_ptr()
    Curvature(Images(wire, features), "classification").fit([(x, y)])
    assert torch.equal(x, before) and (x.stride(), x.data_ptr()) == (strides, place)
