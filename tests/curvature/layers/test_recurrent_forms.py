"""Unrolled recurrent networks have the values and gradients of torch's fused ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from forms import KINDS, assert_form_is_equivalent, leaf, made
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

N, T, WIDTH, HIDDEN = 3, 4, 3, 5

NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "deep": {"num_layers": 3},
    "both directions": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}
recurrent = pytest.mark.parametrize("options", NETWORKS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def states(module: nn.Module, *batch: int) -> tuple[Tensor, ...]:
    """Initial states of a recurrent module."""
    depth = module.num_layers * (2 if module.bidirectional else 1)
    hidden = leaf(depth, *batch, module.proj_size or HIDDEN)
    return (hidden, leaf(depth, *batch, HIDDEN)) if isinstance(module, nn.LSTM) else (hidden,)


def as_argument(initial: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """States as the modules take them."""
    return initial if len(initial) > 1 else initial[0]


@recurrent
@every_kind
def test_recurrent_networks(kind, options):
    module = made(KINDS[kind](WIDTH, HIDDEN, **NETWORKS[options]))
    x = leaf(*((N, T, WIDTH) if module.batch_first else (T, N, WIDTH)))
    initial = states(module, N)
    wrt = [x, *module.parameters()]
    assert_form_is_equivalent(lambda: module(x), wrt)
    assert_form_is_equivalent(lambda: module(x, as_argument(initial)), [*wrt, *initial])


@recurrent
@every_kind
def test_recurrent_networks_without_a_batch_axis(kind, options):
    module = made(KINDS[kind](WIDTH, HIDDEN, **NETWORKS[options]))
    x, initial = leaf(T, WIDTH), states(module)
    wrt = [x, *initial, *module.parameters()]
    assert_form_is_equivalent(lambda: module(x, as_argument(initial)), wrt)


@recurrent
@every_kind
def test_packed_sequences(kind, options):
    module = made(KINDS[kind](WIDTH, HIDDEN, **NETWORKS[options]))
    x = leaf(*((N, T, WIDTH) if module.batch_first else (T, N, WIDTH)))
    initial = states(module, N)

    def run() -> Any:
        packed = pack_padded_sequence(x, [2, 4, 1], module.batch_first, enforce_sorted=False)
        output, final = module(packed, as_argument(initial))
        return output.data, final

    assert_form_is_equivalent(run, [x, *initial, *module.parameters()])


@every_kind
def test_recurrent_networks_drop_only_in_training_and_between_layers(kind):
    module = made(KINDS[kind](WIDTH, HIDDEN, num_layers=2, dropout=1.0))
    x = leaf(T, N, WIDTH)
    wrt = [x, *module.parameters()]
    assert_form_is_equivalent(lambda: module(x), wrt)  # the second layer sees zeros
    module.eval()
    assert_form_is_equivalent(lambda: module(x), wrt)


CELLS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


@pytest.mark.parametrize("batch", [(), (N,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, bias, batch):
    cell = made(CELLS[kind](WIDTH, HIDDEN, bias=bias))
    x, h, c = leaf(*batch, WIDTH), leaf(*batch, HIDDEN), leaf(*batch, HIDDEN)
    initial = (h, c) if kind == "lstm" else (h,)
    wrt = [x, *cell.parameters()]
    assert_form_is_equivalent(lambda: cell(x), wrt)
    assert_form_is_equivalent(lambda: cell(x, as_argument(initial)), [*wrt, *initial])
