"""Norm layers and learned rectifier slopes: exact blocks without a pass through the whole model."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case, Pool
from laws import (
    EXACT,
    assert_complete,
    assert_dense_structures_are_exact,
    fitted,
    negligible,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_laplace.curvature.layers import RULES, Layer

SETTINGS = ("expand", "reduce")


class ChannelsLast(nn.Module):
    """Layer norm over the channels of an image, as convolutional nets write it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Native(nn.Module):
    """The functions of `torch` itself, which take their arguments in another order."""

    def __init__(self, name: str, channels: int):
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        affine, statistics = (self.weight, self.bias), (self.mean, self.variance)
        if self.name == "layer":
            return torch.layer_norm(x.mT, (x.shape[1],), *affine).mT
        if self.name == "group":
            return torch.group_norm(x, 2, *affine)
        if self.name == "rms":
            return torch.rms_norm(x.mT, (x.shape[1],), self.weight).mT + self.bias[:, None]
        if self.name == "instance":
            return torch.instance_norm(x, *affine, None, None, True, 0.1, 1e-5, False)
        return torch.batch_norm(x, *affine, *statistics, False, 0.1, 1e-5, False)


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm((4, 3, 3)),
    "layer-last-axis": lambda: nn.LayerNorm(3, eps=1e-2),
    "layer-channels-last": lambda: ChannelsLast(4),
    "layer-without-bias": lambda: nn.LayerNorm((3, 3), bias=False),
    "group": lambda: nn.GroupNorm(2, 4, eps=1e-2),
    "group-one": lambda: nn.GroupNorm(1, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, eps=1e-2),
    "instance-running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "rms": lambda: nn.RMSNorm(3),
    "rms-axes": lambda: nn.RMSNorm((4, 3, 3), eps=1e-2),
    "batch": lambda: nn.BatchNorm2d(4, eps=1e-2),
    "prelu": lambda: nn.PReLU(),
    "prelu-by-channel": lambda: nn.PReLU(4),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "instance-1d": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch-1d": lambda: nn.BatchNorm1d(4),
    **{
        f"native-{name}": (lambda name=name: Native(name, 4))
        for name in ("layer", "group", "rms", "instance", "batch")
    },
}
NAMES = (*IMAGES, *SEQUENCES)
WITH_BIAS = [name for name in NAMES if not name.startswith(("rms", "prelu", "layer-without"))]


def norm_case(name: str) -> Case:
    """conv -> norm -> tanh -> pooling -> head in evaluation mode, no value at its default."""
    dims = 2 if name in IMAGES else 1
    conv = nn.Conv2d if dims == 2 else nn.Conv1d

    def make() -> nn.Module:
        layer = (IMAGES | SEQUENCES)[name]()
        axes = tuple(range(2, 2 + dims))
        model = nn.Sequential(conv(1, 4, 2), layer, nn.Tanh(), Pool(*axes), nn.Linear(4, 3))
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(0.3 * torch.randn_like(tensor)).abs_()
        return model.eval()

    return seeded_case(make, (1, *(4,) * dims))


def assert_exact_blocks(example: Case, names: list[str], **options) -> None:
    """The blocks that hold these parameters are the GGN's, or its diagonal, all by layer rules."""
    curvature = fitted(example, **options)
    assert_complete(curvature, example.model)
    assert not [group.name for group in curvature.groups if group.role == "generic"]
    for name in names:
        (block,) = [b for b in curvature.blocks.values() if name in b.params]
        assert block.kind in ("dense", "diag"), name
        exact = oracles.ggn(example.model, *example.data, list(block.params))
        exact = exact.diagonal().diag() if block.kind == "diag" else exact
        assert relative_error(block.dense(), exact, negligible(curvature)) < EXACT, name


def of_the_norm(example: Case) -> list[str]:
    return [n for n, p in example.model.named_parameters() if n[:2] == "1." and p.requires_grad]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_blocks_under_kron_are_exact(name, setting):
    example = norm_case(name)
    names = of_the_norm(example)
    assert names
    assert_exact_blocks(example, names, kfac_approx=setting)


@pytest.mark.parametrize("name", NAMES)
def test_dense_structures_are_exact(name):
    assert_dense_structures_are_exact(norm_case(name))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", WITH_BIAS)
def test_one_of_weight_and_bias_frozen(name, frozen):
    example = norm_case(name)
    for key, parameter in example.model[1].named_parameters():
        parameter.requires_grad_(not key.endswith(frozen))
    names = of_the_norm(example)
    assert len(names) == 1
    assert_exact_blocks(example, names)
    assert_dense_structures_are_exact(example)


AFFINELESS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(3, elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4),
    "rms": lambda: nn.RMSNorm(3, elementwise_affine=False),
    "batch": lambda: nn.BatchNorm2d(4, affine=False),
}


def image_case(*layers: nn.Module) -> Case:
    """convolution -> layers -> tanh -> pooling -> head, in evaluation mode."""

    def make() -> nn.Module:
        head = [nn.Tanh(), Pool(2, 3), nn.Linear(4, 3)]
        return nn.Sequential(nn.Conv2d(1, 4, 2), *layers, *head).eval()

    return seeded_case(make, (1, 4, 4))


@pytest.mark.parametrize("name", AFFINELESS)
def test_norms_without_an_affine_part_are_passed_through(name):
    example = image_case(AFFINELESS[name]())
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert set(curvature.coverage.values()) == {"kron"}
    assert_dense_structures_are_exact(example)


class ShiftOnly(nn.Module):
    """A norm with a bias and no weight, which only the functional call allows."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(0.3 * torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (3,), None, self.bias)


def test_a_bias_without_a_weight_has_the_generic_treatment():
    example = image_case(ShiftOnly())
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    assert [group.name for group in curvature.groups if group.role == "generic"] == ["1.bias"]
    assert_dense_structures_are_exact(example)


class Scaled(nn.Module):
    """RMS norm in plain calls, as language models write it: a product with the weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt())


def test_a_norm_written_as_a_product_has_an_exact_block():
    example = image_case(Scaled(3))
    assert_exact_blocks(example, ["1.weight"])
    assert_dense_structures_are_exact(example)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IMAGES)
def test_rows_of_half_precision_inputs_are_single_precision(name, dtype):
    """They equal the rows of the same numbers in float64 up to float32's rounding."""
    torch.manual_seed(5)
    module = IMAGES[name]().eval()
    x = torch.randn(5, 4, 3, 3).to(dtype)
    half, double = (rows_of(module, x.to(kind)) for kind in (dtype, torch.float64))
    assert half.dtype == torch.float32
    assert relative_error(half.double(), double) < 1e-6  # float32, and eps where it is not given


class Described(TorchFunctionMode):
    """Keeps what the layer rules say about the calls made inside."""

    def __init__(self):
        super().__init__()
        self.layers: list[Layer | None] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in RULES:
            self.layers.append(RULES[func](output, *args, **(kwargs or {})))
        return output


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """Input rows of the one call in a module that has a rule."""
    with Described() as seen:
        module.to(x.dtype)(x)
    (layer,) = seen.layers
    assert layer is not None
    return layer.inputs.rows()


def test_rules_leave_running_statistics_alone():
    """In training mode the call itself updates them, once."""
    norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    twin = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    x = torch.randn(3, 2, 5)
    with Described() as seen:
        norm(x)
    twin(x)
    assert len(seen.layers) == 1
    assert torch.equal(norm.running_mean, twin.running_mean)
    assert torch.equal(norm.running_var, twin.running_var)
