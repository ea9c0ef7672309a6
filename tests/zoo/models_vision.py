"""Tiny image models: torchvision's and timm's families, and two plain networks of our own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.case import N_DATA, ZooCase, labelled, lively, zoo_case

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from timm.models.mlp_mixer import MlpMixer
from timm.models.nfnet import NfCfg, NormFreeNet
from torchvision.models import ConvNeXt, MobileNetV3, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import BasicBlock, ResNet

CLASSES = 3


def images(size: int, *label_axes: int) -> list[tuple[Tensor, Tensor]]:
    """Colour images with labels."""
    x = torch.randn(N_DATA, 3, size, size, dtype=torch.float64)
    return labelled(x, CLASSES, *label_axes)


class NarrowResNet(ResNet):
    """torchvision's ResNet with a 64th of its channels, at least 2; all else is inherited."""

    def _make_layer(self, block, planes, *args, **options):
        if planes == 64:
            self.conv1 = nn.Conv2d(3, 2, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(2)
            self.inplanes = 2
        return super()._make_layer(block, max(2, planes // 64), *args, **options)


@zoo_case
def resnet18(name: str) -> ZooCase:
    model = NarrowResNet(BasicBlock, [2, 1, 1, 1])
    model.fc = nn.Linear(8, CLASSES)
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(16),
        {"*bn?.*": "dense", "*downsample.1.*": "dense", "*": "kron"},
        notes="batch norm in evaluation mode, in-place ReLU, strided shortcuts",
    )


@zoo_case
def mobilenet_v3(name: str) -> ZooCase:
    setting = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(8, 5, 16, 8, False, "HS", 1, 1, 1.0),
    ]
    model = MobileNetV3(setting, last_channel=8, num_classes=CLASSES)
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(16),
        {
            "features.0.1.*": "dense",
            "features.3.1.*": "dense",
            "features.*.block.?.1.*": "dense",
            "*": "kron",
        },
        notes="depthwise convolutions, squeeze-and-excitation, hard activations",
    )


@zoo_case
def convnext(name: str) -> ZooCase:
    setting = [CNBlockConfig(4, 6, 1), CNBlockConfig(6, None, 2)]
    model = ConvNeXt(setting, num_classes=CLASSES)
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(16),
        {
            "*layer_scale": "diag",
            "features.0.1.*": "dense",  # the stem's norm
            "features.*.block.2.*": "dense",
            "features.2.0.*": "dense",  # the norm before downsampling
            "classifier.0.*": "dense",
            "*": "kron",
        },
        notes="7 x 7 depthwise convolutions, channels-last linear layers, layer scale",
    )


@zoo_case
def swin(name: str) -> ZooCase:
    model = SwinTransformer(
        patch_size=[2, 2],
        embed_dim=4,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=[2, 2],
        mlp_ratio=2.0,
        num_classes=CLASSES,
    )
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(8),
        {
            "*norm*": "dense",
            "features.0.2.*": "dense",  # the norm after the patch embedding
            "*relative_position_bias_table": "diag",
            "*": "kron",
        },
        notes="windows flattened into the first axis, shifted windows, functional projections",
    )


@zoo_case
def vit(name: str) -> ZooCase:
    model = VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=10,
        num_classes=CLASSES,
    )
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(8),
        {"class_token": "diag", "*pos_embedding": "diag", "*ln*": "dense", "*": "kron"},
        notes="class token: in the last block the other tokens' MLP rows reach no output",
    )


@zoo_case
def mixer(name: str) -> ZooCase:
    model = MlpMixer(
        num_classes=CLASSES, img_size=8, patch_size=4, num_blocks=2, embed_dim=6, mlp_ratio=(1.0, 2)
    )
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(8),
        {"*norm*": "dense", "*": "kron"},
        notes="token mixing: the shared axis of a linear layer is the channel axis",
    )


@zoo_case
def nfnet(name: str) -> ZooCase:
    setting = NfCfg(
        depths=(1, 2),
        channels=(8, 16),
        stem_type="3x3",
        stem_chs=4,
        group_size=4,
        bottle_ratio=0.5,
        ch_div=4,
        skipinit=True,
    )
    model = NormFreeNet(setting, num_classes=CLASSES)
    return ZooCase(
        name,
        lively(model),
        "classification",
        images(16),
        {
            "*skipinit_gain": "diag",
            "head.fc.*": "kron",
            "*conv*.bias": "kron",
            "*conv*.weight": "diag",
            "*conv*.gain": "diag",
        },
        notes="weights standardised before they meet data; a scalar gain applied in place",
    )


class UNet(nn.Module):
    """One level of a U-Net: down, through, up by a transposed convolution, with a skip."""

    def __init__(self):
        super().__init__()
        self.into = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.out = nn.Sequential(nn.Conv2d(8, 5, 3, padding=1), nn.InstanceNorm2d(5, affine=True))
        self.head = nn.Conv2d(5, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.into(x)
        h = self.up(self.down(skip))
        return self.head(F.silu(self.out(torch.cat([skip, h], 1))))


@zoo_case
def unet(name: str) -> ZooCase:
    return ZooCase(
        name,
        lively(UNet()),
        "classification",
        images(4, 4, 4),
        {"into.1.*": "dense", "out.1.*": "dense", "*": "kron"},
        notes="pixel outputs (n, c, h, w); grouped transposed convolution with output padding",
    )


@zoo_case
def group_norm_cnn(name: str) -> ZooCase:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.GroupNorm(3, 6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular"),
        nn.GroupNorm(1, 6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    x = torch.randn(N_DATA, 3, 6, 6, dtype=torch.float64)
    return ZooCase(
        name,
        lively(model),
        "regression",
        list(zip(x, torch.randn(N_DATA, 2, dtype=torch.float64), strict=True)),
        {"1.*": "dense", "4.*": "dense", "*": "kron"},
        notes="regression with two outputs",
    )
