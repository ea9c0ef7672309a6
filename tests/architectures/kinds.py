"""The layers of the table, in its order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import modules
from architectures.kind import POSITIONS, VOCABULARY, WIDTH, Kind, ragged, rows, tokens
from architectures.modules import SQUARE, TABLE, attention, called, parameters
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D

SIGNAL, IMAGE, VOLUME = rows(WIDTH, 6), rows(WIDTH, 4, 4), rows(WIDTH, 3, 3, 3)


def products() -> list[Kind]:
    """Linear maps of rows, whoever calls them."""
    return [
        Kind("`nn.Linear`", lambda: nn.Linear(WIDTH, 3), linear=True),
        Kind("`Conv1D` of transformers (`addmm`)", lambda: Conv1D(3, WIDTH), linear=True),
        Kind("`x @ weight`", parameters(lambda x, weight: x @ weight, weight=SQUARE), linear=True),
        Kind(
            "`weight @ x`, over positions",
            parameters(lambda x, weight: weight @ x, weight=(2, POSITIONS)),
            linear=True,
            channels=1,
        ),
        Kind(
            '`einsum("nti,io->nto")`',
            parameters(lambda x, weight: torch.einsum("nti,io->nto", x, weight), weight=(WIDTH, 3)),
            linear=True,
        ),
        Kind(
            '`einsum("nbi,bio->nbo")`, experts side by side',
            parameters(
                lambda x, weight: torch.einsum("nbi,bio->nbo", x, weight).flatten(1),
                weight=(POSITIONS, WIDTH, 2),
            ),
            linear=True,
        ),
    ]


def convolutions() -> list[Kind]:
    """With and without groups, and transposed."""
    images = {"inputs": IMAGE, "linear": True, "channels": 1}
    signals, volumes = images | {"inputs": SIGNAL}, images | {"inputs": VOLUME}
    c = WIDTH
    return [
        Kind("`nn.Conv1d`", lambda: nn.Conv1d(c, 3, 3, stride=2, dilation=2), **signals),
        Kind("`nn.Conv2d`", lambda: nn.Conv2d(c, 3, 3, padding=1), **images),
        Kind("`nn.Conv3d`", lambda: nn.Conv3d(c, 3, 2), **volumes),
        Kind("`nn.Conv2d`, 2 groups", lambda: nn.Conv2d(c, 6, 3, groups=2), **images),
        Kind("`nn.Conv2d`, depthwise", lambda: nn.Conv2d(c, c, 3, groups=c), **images),
        Kind("`nn.ConvTranspose1d`", lambda: nn.ConvTranspose1d(c, 3, 3), **signals),
        Kind(
            "`nn.ConvTranspose2d`, 2 groups, strided",
            lambda: nn.ConvTranspose2d(c, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            **images,
        ),
        Kind("`nn.ConvTranspose3d`", lambda: nn.ConvTranspose3d(c, 3, 2), **volumes),
    ]


def tables() -> list[Kind]:
    """Lookups."""
    return [
        Kind("`nn.Embedding`", lambda: nn.Embedding(VOCABULARY, WIDTH), tokens, linear=True),
        Kind(
            "`nn.Embedding` with `padding_idx`",
            lambda: nn.Embedding(VOCABULARY, WIDTH, padding_idx=0),
            tokens,
            linear=True,
        ),
        Kind("embedding tied to the head", parameters(modules.tied, weight=TABLE), tokens),
        Kind("`F.embedding_bag`", parameters(modules.bag, weight=TABLE), tokens),
        Kind(
            "position embedding `x + p`",
            parameters(lambda x, p: x + p, p=(1, POSITIONS, WIDTH)),
        ),
        Kind("class token", parameters(modules.class_token, token=(1, 1, WIDTH))),
        Kind(
            "relative-position table",
            parameters(modules.relative_bias, table=(2 * POSITIONS - 1,)),
        ),
    ]


def norms() -> list[Kind]:
    """Scales, shifts and slopes."""
    c = WIDTH
    return [
        Kind("`nn.LayerNorm`", lambda: nn.LayerNorm(c)),
        Kind("`nn.RMSNorm`", lambda: nn.RMSNorm(c)),
        Kind("`nn.GroupNorm`", lambda: nn.GroupNorm(2, c), IMAGE, channels=1),
        Kind("`nn.InstanceNorm2d`", lambda: nn.InstanceNorm2d(c, affine=True), IMAGE, channels=1),
        Kind("`nn.BatchNorm2d`, running statistics", lambda: nn.BatchNorm2d(c), IMAGE, channels=1),
        Kind("`nn.PReLU`", lambda: nn.PReLU(c), IMAGE, channels=1),
        Kind("scale or gate `x * g`", parameters(lambda x, g: x * g, g=(WIDTH,))),
    ]


def attentions() -> list[Kind]:
    """torch's fused attention, taken apart."""
    c = WIDTH
    return [
        Kind("`nn.MultiheadAttention`, self", attention()),
        Kind(
            "`nn.MultiheadAttention`, cross",
            called(lambda: nn.MultiheadAttention(c, 2, batch_first=True), modules.cross),
        ),
        Kind(
            "`nn.MultiheadAttention`, `kdim`, `vdim`",
            called(
                lambda: nn.MultiheadAttention(c, 2, kdim=3, vdim=3, batch_first=True),
                modules.separate,
            ),
        ),
        Kind("`nn.MultiheadAttention`, `add_bias_kv`", attention(add_bias_kv=True)),
        Kind(
            "`nn.TransformerEncoderLayer`",
            lambda: nn.TransformerEncoderLayer(c, 2, 5, batch_first=True),
        ),
    ]


def recurrent() -> list[Kind]:
    """Networks over time, and their cells."""
    c, first = WIDTH, modules.first

    def lstm() -> nn.Module:
        return nn.LSTM(c, 3, batch_first=True)

    return [
        Kind("`nn.LSTM`", called(lstm, first)),
        Kind("`nn.GRU`", called(lambda: nn.GRU(c, 3, batch_first=True), first)),
        Kind("`nn.RNN`", called(lambda: nn.RNN(c, 3, batch_first=True), first)),
        Kind("`nn.LSTM`, packed, lengths differ", called(lstm, modules.packed), ragged),
        Kind("`nn.LSTMCell`", called(lambda: nn.LSTMCell(c, 3), first), rows(c)),
        Kind("`nn.GRUCell`", lambda: nn.GRUCell(c, 3), rows(c)),
        Kind("`nn.RNNCell`", lambda: nn.RNNCell(c, 3), rows(c)),
    ]


def functions_of_parameters() -> list[Kind]:
    """Weights that are computed from parameters, and what no rule knows."""
    c = WIDTH
    return [
        Kind("`weight_norm(nn.Linear)`", lambda: weight_norm(nn.Linear(c, 3))),
        Kind("parametrised `nn.Linear`", modules.symmetric),
        Kind(
            "LoRA, `F.linear(x, weight + up @ down)`",
            parameters(modules.lora, weight=(3, c), up=(3, 2), down=(2, c)),
        ),
        Kind(
            "`F.linear(x, weight.T)`",
            parameters(lambda x, weight: F.linear(x, weight.T), weight=(c, 3)),
            linear=True,
        ),
        Kind("`nn.Bilinear`", called(lambda: nn.Bilinear(2, 2, 3), modules.pair)),
        Kind("`torch.cdist(x, points)`", parameters(modules.centres, points=(3, c))),
    ]


KINDS = [
    *products(),
    *convolutions(),
    *tables(),
    *norms(),
    *attentions(),
    *recurrent(),
    *functions_of_parameters(),
]
