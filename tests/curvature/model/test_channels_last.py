"""Convolutions run in another memory order; the curvature is that of the model as it stands.

Where there are norms they run in their own, which is faster then.
"""

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

Wire = Callable[["Images", Tensor], Tensor]


class Images(nn.Module):
    """Convolution, what lies between, convolution; a function puts them together."""

    def __init__(self, wire: Wire, middle: nn.Module, features: int = CHANNELS):
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.middle = middle
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.head = nn.Linear(features, CLASSES)
        self._wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self._wire(self, x)


def in_line(m: Images, x: Tensor) -> Tensor:
    h = m.second(m.middle(m.first(x).relu()))
    return m.head(h.tanh().mean((2, 3)))


def normed_first(m: Images, x: Tensor) -> Tensor:
    """A norm before any convolution has been seen."""
    return in_line(m, nn.functional.group_norm(x, 1))


def normed_last(m: Images, x: Tensor) -> Tensor:
    """A norm behind all of them, of features."""
    h = m.second(m.middle(m.first(x).relu())).tanh().mean((2, 3))
    return m.head(nn.functional.layer_norm(h, h.shape[1:]))


def residual(m: Images, x: Tensor) -> Tensor:
    h = m.first(x)
    h += m.second(m.middle(h.relu()))
    return m.head(h.relu_().flatten(2).mean(2))


def checkpointed(m: Images, x: Tensor) -> Tensor:
    h = checkpoint(lambda x: m.middle(m.first(x).tanh()), x, use_reentrant=False)
    return m.head(m.second(h).tanh().mean((2, 3)))


def batch_norm() -> nn.Module:
    """With statistics of its own, so that evaluation mode is not the identity."""
    norm = nn.BatchNorm2d(CHANNELS).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "nothing": nn.Identity,
    "stride": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2),
    "groups": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=CHANNELS),
    "pointwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1),
    "circular": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"),
    "same": lambda: nn.Conv2d(CHANNELS, CHANNELS, (2, 4), padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, stride=2, output_padding=1),
    "max pooling": lambda: nn.MaxPool2d(3, 2, 1),
    "one channel between": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, 1, 3, padding=1), nn.Tanh(), nn.Conv2d(1, CHANNELS, 3)
    ),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": batch_norm,
    "instance norm": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "group norm": lambda: nn.GroupNorm(2, CHANNELS),
    "layer norm": lambda: nn.LayerNorm([CHANNELS, SIDE, SIDE]),
    "rms norm": lambda: nn.RMSNorm([CHANNELS, SIDE, SIDE]),
}


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, SIDE, SIDE), torch.arange(n) % CLASSES


def assert_same_in_double(
    model: nn.Module, *batches: tuple[Tensor, Tensor], **options
) -> Curvature:
    """The same blocks as those of the float64 model, whose convolutions are left alone."""
    exact = Curvature(copy.deepcopy(model).double(), "classification", **options)
    exact.fit([(x.double(), y) for x, y in batches])
    curvature = Curvature(model, "classification", **options).fit(batches)
    blocks = {name: block.double() for name, block in dense_blocks(curvature).items()}
    assert_same_blocks(blocks, dense_blocks(exact), SINGLE)
    return curvature


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch is slower there
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("middle", MIDDLES)
def test_single_precision_gives_the_blocks_of_double(middle, n):
    model = Images(in_line, MIDDLES[middle]())
    for setting in ("expand", "reduce"):
        curvature = assert_same_in_double(model, batch(n), kfac_approx=setting)
        assert curvature.ggn.knowledge.reorders
    assert_same_in_double(model, batch(n), hessian_structure="diag")


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("middle", NORMS)
def test_networks_with_norms_are_left_alone(middle, n):
    """From their first batch on, whatever the structure."""
    model = Images(in_line, NORMS[middle]())
    for options in (
        {"kfac_approx": "expand"},
        {"kfac_approx": "reduce"},
        {"hessian_structure": "diag"},
    ):
        curvature = assert_same_in_double(model, batch(n), batch(4), **options)
        assert not curvature.ggn.knowledge.reorders


@pytest.mark.parametrize("wire", [normed_first, normed_last], ids=lambda wire: wire.__name__)
def test_a_norm_of_images_counts_wherever_it_is(wire):
    """Also where it is no module: calls are seen. Norms of features are none of images."""
    curvature = assert_same_in_double(Images(wire, nn.Identity()), batch(5), kfac_approx="expand")
    assert curvature.ggn.knowledge.reorders == (wire is normed_last)


def orders_seen(model: Images, n: int) -> list[bool]:
    """Whether the second convolution got channels last, in each run of the whole first batch."""
    seen = []

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if len(given[0]) < n:  # the check that outputs repeat
            return
        with torch._C.DisableTorchFunction():  # a model that asks for it is left alone
            seen.append(given[0].is_contiguous(memory_format=torch.channels_last))

    handle = model.second.register_forward_pre_hook(look)
    Curvature(model, "classification").fit([batch(n)])
    handle.remove()
    return seen


def test_how_often_a_model_runs():
    """Once in the other order, or once more in its own; once where a norm comes first."""
    assert orders_seen(Images(in_line, nn.Identity()), 5) == [True]
    assert orders_seen(Images(in_line, batch_norm()), 5) == [True, False]
    assert orders_seen(Images(normed_first, nn.Identity()), 5) == [False]
    assert orders_seen(Images(in_line, nn.Identity()), 1) == [False, False]  # with the check


@pytest.mark.parametrize("middle", ["nothing", "batch norm"])
@pytest.mark.parametrize("wire", [residual, checkpointed], ids=lambda wire: wire.__name__)
def test_other_wirings(wire, middle):
    model = Images(wire, (MIDDLES | NORMS)[middle]())
    for setting in ("expand", "reduce"):
        curvature = assert_same_in_double(model, batch(5), batch(1), kfac_approx=setting)
        assert curvature.ggn.knowledge.reorders == (middle == "nothing")


ORDERS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("model_order", ORDERS)
@pytest.mark.parametrize("data_order", ORDERS)
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    "middle", ["batch norm", "group norm", "max pooling", "instance norm", "layer norm"]
)
def test_callers_may_have_chosen_an_order(model_order, data_order, middle, n):
    model = Images(in_line, (MIDDLES | NORMS)[middle]())
    x, y = batch(n)
    want = Curvature(model, "classification", kfac_approx="expand").fit([(x, y)])
    model.to(memory_format=model_order)
    x = x.contiguous(memory_format=data_order)
    got = Curvature(model, "classification", kfac_approx="expand").fit([(x, y)])
    assert_same_blocks(dense_blocks(got), dense_blocks(want), SINGLE)


def test_weights_stay_as_they_are():
    model = Images(in_line, MIDDLES["groups"]())
    before = {name: (p.clone(), p.stride()) for name, p in model.named_parameters()}
    Curvature(model, "classification").fit([batch(4)])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.stride() == before[name][1]
