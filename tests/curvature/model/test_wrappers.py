"""Wrappers and modes around a model: data parallel, checkpoints, scripts, compilers, dropout."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Attention, Case, build, case
from laws import (
    EXACT,
    assert_complete,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_laplace.errors import UnsupportedUse

SETTINGS = ("expand", "reduce")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Linear(3, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(checkpoint(self.inner, h, use_reentrant=self.reentrant))


def test_dropout_is_off_during_the_pass():
    torch.manual_seed(4)
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    example = case(plain, (3,), "classification")
    dropping = nn.Sequential(plain[0], nn.Tanh(), nn.Dropout(0.5), plain[2])
    got = fitted(Case(dropping, "classification", example.batches))
    want = fitted(example)
    for name, twin in (("0.weight", "0.weight"), ("3.weight", "2.weight")):
        assert relative_error(got.blocks[name].dense(), want.blocks[twin].dense()) < 1e-15


def test_data_parallel_is_the_model_inside():
    example = build("cnn")
    want = fitted(example)
    wrapped = nn.DataParallel(example.model)
    got = fitted(Case(wrapped, "classification", example.batches))
    assert len(got.blocks) == len(want.blocks)
    for name, block in got.blocks.items():
        twin = want.blocks[name.removeprefix("module.")]
        assert relative_error(block.dense(), twin.dense()) < 1e-15


@pytest.mark.parametrize("setting", SETTINGS)
def test_checkpointed_layers_are_seen(setting):
    example = seeded_case(lambda: Checkpointed(reentrant=False))
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, example.model)
    for layer in ("stem", "inner.0", "head"):
        factors = oracles.kfac_factors(example.model, layer, example.data, setting)
        dense = oracles.kfac_block(factors, bias_column=True)
        assert relative_error(curvature.blocks[f"{layer}.weight"].dense(), dense) < EXACT


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # making the case
def test_reentrant_checkpoints_are_refused():
    with pytest.raises(UnsupportedUse, match="(?i)reentrant|re-entrant"):
        fitted(seeded_case(lambda: Checkpointed(reentrant=True)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # making the bad input
@pytest.mark.parametrize("where", ["whole", "part"])
def test_scripted_models_are_refused(where):
    plain = build("mlp-tanh")
    model = torch.jit.script(plain.model)
    if where == "part":
        model = nn.Sequential(model, nn.Linear(3, 3).double())
    with pytest.raises(UnsupportedUse, match="(?i)script"):
        fitted(Case(model, "classification", plain.batches))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own import
def test_compiled_models_are_unwrapped_or_refused():
    """The tape cannot look into compiled code; `torch.compile` itself compiles nothing yet."""
    plain = build("mlp-tanh")
    want = fitted(plain)
    whole = fitted(Case(torch.compile(plain.model), "classification", plain.batches))
    assert len(whole.blocks) == len(want.blocks) == 2
    for got, block in zip(whole.blocks.values(), want.blocks.values(), strict=True):
        assert relative_error(got.dense(), block.dense()) < 1e-15
    inside = nn.Sequential(torch.compile(plain.model))
    with pytest.raises(UnsupportedUse, match="(?i)compile"):
        fitted(Case(inside, "classification", plain.batches))


def test_attention_of_plain_projections_has_rules():
    """The counterpart of MultiheadAttention: every projection is a Kronecker block."""

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(3)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x).mean(1))

    curvature = fitted(seeded_case(Reader, (4, 3)))
    assert set(curvature.coverage.values()) == {"kron"}
