"""Which parameters are random, and by which approximation: globs, subsets, `uncovered`."""

from __future__ import annotations

import logging

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import KINDS, Pool, build, case
from laws import (
    EXACT,
    assert_complete,
    assert_same_blocks,
    dense_blocks,
    fitted,
    relative_error,
)
from torch import Tensor, nn

from kfac_laplace.errors import InvalidValue, KfacLaplaceError, UnsupportedUse


class ConvThenTokens(nn.Module):
    """conv -> linear over positions -> mean -> head: two layers that share, with speaking names."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 2)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).tanh().flatten(2).mT
        return self.head(self.mix(x).tanh().mean(1))


class HeadFirst(nn.Module):
    """The last layer in use is registered first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.body = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def conv_then_tokens():
    torch.manual_seed(3)
    return case(ConvThenTokens(), (1, 4, 3), "classification")


def assert_setting(example, curvature, layer: str, setting: str) -> None:
    other = {"expand": "reduce", "reduce": "expand"}[setting]
    got = curvature.blocks[f"{layer}.weight"].factors
    want = oracles.kfac_factors(example.model, layer, example.data, setting)
    not_want = oracles.kfac_factors(example.model, layer, example.data, other)
    assert relative_error(got.input, want.input) < EXACT
    assert relative_error(got.input, not_want.input) > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_auto_reads_the_setting_from_the_output(name):
    """Attention keys apart, whose gradients cancel under reduce: they take expand."""
    example = build(name)
    auto = dense_blocks(fitted(example, kfac_approx="auto"))
    chosen = dense_blocks(fitted(example, kfac_approx=example.setting))
    keys = {name for name in auto if ".k." in name}
    if keys:
        expand = dense_blocks(fitted(example, kfac_approx="expand"))
        chosen |= {name: expand[name] for name in keys}
    assert_same_blocks(auto, chosen, 0.0)


def test_auto_keeps_reduce_for_token_inputs_with_one_output_row():
    example = conv_then_tokens()
    curvature = fitted(example)
    for layer in ("conv1", "mix"):
        assert_setting(example, curvature, layer, "reduce")


def test_globs_choose_by_layer():
    example = conv_then_tokens()
    curvature = fitted(example, kfac_approx={"conv*": "reduce", "*": "expand"})
    assert_setting(example, curvature, "conv1", "reduce")
    assert_setting(example, curvature, "mix", "expand")


def test_the_first_matching_glob_wins():
    example = conv_then_tokens()
    curvature = fitted(example, kfac_approx={"*": "expand", "conv*": "reduce"})
    assert_setting(example, curvature, "conv1", "expand")


def test_layers_that_no_glob_matches_fall_to_auto():
    example = conv_then_tokens()
    curvature = fitted(example, kfac_approx={"conv*": "expand"})
    assert_setting(example, curvature, "conv1", "expand")
    assert_setting(example, curvature, "mix", "reduce")


def test_a_glob_may_say_auto():
    example = conv_then_tokens()
    curvature = fitted(example, kfac_approx={"mix*": "auto", "*": "expand"})
    assert_setting(example, curvature, "mix", "reduce")
    assert_setting(example, curvature, "conv1", "expand")


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(InvalidValue, match="covn"):
        fitted(conv_then_tokens(), kfac_approx={"covn*": "reduce", "*": "expand"})


@pytest.mark.parametrize(
    "options",
    [
        {"kfac_approx": "Reduce"},
        {"kfac_approx": {"conv*": "sum"}},
        {"fisher": "monte-carlo"},
        {"hessian_structure": "low-rank"},
        {"uncovered": "drop"},
        {"subset_of_weights": "first_layer"},
        {"subset_of_weights": []},
        {"subset_of_weights": ["nothing*"]},
    ],
    ids=str,
)
def test_unknown_options_are_refused(options):
    with pytest.raises(InvalidValue):
        fitted(conv_then_tokens(), **options)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_last_layer_is_the_last_in_use(structure):
    example = case(HeadFirst(), (3,), "classification")
    curvature = fitted(example, subset_of_weights="last_layer", hessian_structure=structure)
    assert_complete(curvature, example.model)
    chosen = {name for name, kind in curvature.coverage.items() if kind != "frozen"}
    assert chosen == {"head.weight", "head.bias"}
    names = [name for block in curvature.blocks.values() for name in block.params]
    assert sorted(names) == ["head.bias", "head.weight"]
    if structure == "full":
        (block,) = curvature.blocks.values()
        exact = oracles.ggn(example.model, *example.data, list(block.params))
        assert relative_error(block.dense(), exact) < EXACT


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_subset_globs_keep_the_other_parameters_out(structure):
    example = build("vit")
    globs = ["attention.*", "position"]
    curvature = fitted(example, subset_of_weights=globs, hessian_structure=structure)
    assert_complete(curvature, example.model)
    for name, kind in curvature.coverage.items():
        wanted = name.startswith("attention.") or name == "position"
        assert (kind != "frozen") == wanted, name
    if structure != "kron":
        return
    everything = fitted(example)
    for name, block in curvature.blocks.items():
        assert relative_error(block.dense(), everything.blocks[name].dense()) < EXACT


def test_a_subset_glob_may_split_a_layer():
    example = build("mlp-tanh")
    curvature = fitted(example, subset_of_weights=["*.weight"])
    assert_complete(curvature, example.model)
    assert curvature.coverage["0.bias"] == "frozen"
    factors = oracles.kfac_factors(example.model, "0", example.data, "reduce", joint_bias=False)
    dense = oracles.kfac_block(factors)
    assert relative_error(curvature.blocks["0.weight"].dense(), dense) < EXACT


def test_uncovered_error_names_the_parameter():
    example = build("vit")
    with pytest.raises(UnsupportedUse, match="position") as caught:
        fitted(example, uncovered="error")
    assert isinstance(caught.value, RuntimeError)


def test_uncovered_error_is_silent_where_every_parameter_has_a_rule():
    example = build("cnn")
    curvature = fitted(example, uncovered="error")
    assert set(curvature.coverage.values()) == {"kron"}


def test_uncovered_freeze_keeps_them_out_and_names_them(caplog):
    example = build("vit")
    with caplog.at_level(logging.INFO):
        curvature = fitted(example, uncovered="freeze")
    assert_complete(curvature, example.model)
    assert curvature.coverage["position"] == "frozen"
    assert curvature.coverage["norm.weight"] == "dense"
    assert "position" in caplog.text
    kept = [name for block in curvature.blocks.values() for name in block.params]
    assert len(kept) == len(oracles.trainable(example.model)) - 1


def test_the_diagonal_fallback_is_listed_once_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        fitted("vit", uncovered="diag")
    records = [r for r in caplog.records if "position" in r.getMessage()]
    assert len(records) == 1
    assert records[0].name.startswith("kfac_laplace")
    assert "norm.weight" not in records[0].getMessage()


def test_frozen_parameters_are_named_frozen():
    for name in ("frozen-bias", "frozen-weight"):
        example = build(name)
        curvature = fitted(example)
        assert_complete(curvature, example.model)
        frozen = [k for k, v in curvature.coverage.items() if v == "frozen"]
        assert frozen == [{"frozen-bias": "0.bias", "frozen-weight": "0.weight"}[name]]


def test_a_model_with_nothing_to_learn_is_refused():
    example = build("mlp-tanh")
    example.model.requires_grad_(False)
    with pytest.raises(KfacLaplaceError, match="(?i)trainable|parameter"):
        fitted(example)


def test_curvature_stops_at_the_first_trainable_layer():
    """Nothing below it needs a gradient, and what is above does not change by freezing below."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), Pool(2, 3), nn.Linear(2, 2))
    example = case(model, (1, 3, 3), "classification")
    want = fitted(example).blocks["3.weight"].dense()
    example.model[0].requires_grad_(False)
    frozen = fitted(example)
    assert list(frozen.blocks) == ["3.weight"]
    assert relative_error(frozen.blocks["3.weight"].dense(), want) < 1e-15


def test_a_trainable_bias_added_by_hand_is_found():
    """x + bias is no rule's use; the linear call beside it has no bias of its own."""

    class HandBias(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))
            self.bias = nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.bias

    example = case(HandBias(), (3,), "classification")
    curvature = fitted(example)
    assert curvature.coverage == {"weight": "kron", "bias": "diag"}
    exact = oracles.ggn(example.model, *example.data, ["bias"])
    assert relative_error(curvature.blocks["bias"].dense(), exact.diagonal().diag()) < EXACT
