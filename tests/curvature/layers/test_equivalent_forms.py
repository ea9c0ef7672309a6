"""Equivalent forms where fused calls do not go: forward derivatives, copies, recording."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forms import DOUBLE, KINDS, TOLERANCE, Classifier, in_forms, leaf, made
from laws import assert_dense_structures_are_exact, fitted, seeded_case
from torch import Tensor, nn

N, T, WIDTH, HIDDEN = 3, 4, 3, 5


class Attending(nn.Module):
    """(n, t, e) to (n, t, e), with everything that attention may do."""

    def __init__(self, need_weights: bool):
        super().__init__()
        options = {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}
        self.attention = nn.MultiheadAttention(WIDTH, 1, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
        options = {"attn_mask": ahead, "need_weights": self.need_weights, "is_causal": True}
        return self.attention(x, x, x, **options)[0]


class Reading(nn.Module):
    """(n, t, i) to the outputs of a recurrent network."""

    def __init__(self, kind: str):
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.network = KINDS[kind](WIDTH, HIDDEN, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


FUSED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attending(need_weights=True),
    "attention without weights": lambda: Attending(need_weights=False),
    **{kind: lambda kind=kind: Reading(kind) for kind in KINDS},
}
every_fused_model = pytest.mark.parametrize("kind", FUSED)


def functional(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The model in forms as a function of its parameters and its inputs."""

    def call(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return in_forms(lambda: torch.func.functional_call(model, params, (x,)))

    return call


@every_fused_model
def test_forward_derivatives_pair_with_reverse_ones(kind):
    """⟨u, J v⟩ = ⟨Jᵀu, v⟩, with J v by the form and Jᵀu by the fused call."""
    model, x = made(FUSED[kind]()), leaf(N, T, WIDTH)
    params = dict(model.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    held = {name: p.detach() for name, p in params.items()}
    _, change = torch.func.jvp(
        functional(model), (held, x.detach()), (tangents, torch.ones_like(x))
    )
    u = torch.randn_like(change)
    *by_parameter, by_input = torch.autograd.grad(model(x), [*params.values(), x], u)
    pairs = zip(by_parameter, tangents.values(), strict=True)
    expected = by_input.sum() + sum((g * v).sum() for g, v in pairs)
    torch.testing.assert_close((u * change).sum(), expected, **TOLERANCE)


@every_fused_model
def test_forms_run_vectorised_over_copies_of_the_parameters(kind):
    model, x = made(FUSED[kind]()), torch.randn(N, T, WIDTH, dtype=DOUBLE)
    copies = {name: torch.randn(N, *p.shape, dtype=DOUBLE) for name, p in model.named_parameters()}
    together = torch.func.vmap(functional(model))(copies, x[:, None])
    for k in range(N):
        own = {name: copy[k] for name, copy in copies.items()}
        alone = torch.func.functional_call(model, own, (x[k : k + 1],))
        torch.testing.assert_close(together[k], alone, **TOLERANCE)


class Crossing(nn.Module):
    """Attention to another sequence, sequence-first, with a width of its own for each input."""

    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 3, kdim=2, vdim=4)

    def forward(self, x: Tensor) -> Tensor:
        source = x.transpose(0, 1)
        key, value = self.key(source), self.value(source)
        return self.attention(source[:2], key, value)[0].transpose(0, 1)


class Stepping(nn.Module):
    """A cell used by hand."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            hidden.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(hidden, 1)


def recurrent_classifier(kind: str) -> Classifier:
    return Classifier(Reading(kind), 4 if kind == "projected" else 2 * HIDDEN)


def transformer_layer(norm_first: bool) -> nn.Module:
    options = {"batch_first": True, "dropout": 0.0, "norm_first": norm_first}
    return nn.TransformerEncoderLayer(WIDTH, 1, 4, **options)


RECORDED: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Classifier(Attending(need_weights=True), WIDTH),
    "attention without weights": lambda: Classifier(Attending(need_weights=False), WIDTH),
    "cross-attention": lambda: Classifier(Crossing(), WIDTH),
    "post-norm": lambda: Classifier(transformer_layer(norm_first=False), WIDTH),
    "pre-norm": lambda: Classifier(transformer_layer(norm_first=True), WIDTH),
    **{kind: lambda kind=kind: recurrent_classifier(kind) for kind in KINDS},
    "lstm cell": lambda: Classifier(Stepping(nn.LSTMCell(WIDTH, HIDDEN)), HIDDEN),
    "gru cell": lambda: Classifier(Stepping(nn.GRUCell(WIDTH, HIDDEN)), HIDDEN),
    "rnn cell": lambda: Classifier(Stepping(nn.RNNCell(WIDTH, HIDDEN)), HIDDEN),
}
APPENDED = {"body.attention.bias_k", "body.attention.bias_v"}


@pytest.mark.parametrize("kind", RECORDED)
def test_dense_structures_are_exact(kind):
    assert_dense_structures_are_exact(seeded_case(RECORDED[kind], (T, WIDTH)))


@pytest.mark.parametrize("kind", RECORDED)
def test_every_projection_has_kronecker_factors(kind):
    coverage = fitted(seeded_case(RECORDED[kind], (T, WIDTH))).coverage
    others = {name for name in coverage if "norm" in name} | APPENDED
    assert {name for name, how in coverage.items() if how != "kron"} == others & set(coverage)
