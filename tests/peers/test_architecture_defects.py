"""What peers get wrong on the layers of modern networks, each run against them."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import pytest
import torch
from laws import EXACT, assert_complete, relative_error
from peers import peer
from torch import Tensor, nn

from kfac_laplace import Categorical, Curvature, Laplace

curvlinops = pytest.importorskip("curvlinops")

CLASSES, N = 3, 24


class Pooled(nn.Module):
    """A body over (n, t, 4), pooled, and a head."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.head = body, nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head((h[0] if isinstance(h, tuple) else h).tanh().flatten(1, -2).mean(1))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Windows(nn.Module):
    """Two tokens each, flattened into the first axis as window attention does it."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, x.shape[-1])
        return self.lin(windows).reshape(x.shape)


class Scaled(nn.Module):
    """A raw parameter, as layer scale and position embeddings are."""

    def __init__(self):
        super().__init__()
        self.lin, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) * self.scale


class Channels(nn.Module):
    """A layer over (n, 4, t)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mT).mT


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding((x[..., 0].abs() * 3).long().clamp_max(6))


def theirs(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, approximation: str = "expand"):
    """curvlinops' exact K-FAC of one batch, a raw sum."""
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        [p for p in model.parameters() if p.requires_grad],
        [(x, y)],
        fisher_type="type-2",
        kfac_approx=approximation,
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    return operator


def pooled(body: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    return peer.seeded(lambda: Pooled(body())), *peer.data("classification", 6, 4, n=N)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "BatchNorm": lambda: Channels(nn.BatchNorm1d(4)),
    "GroupNorm": lambda: Channels(nn.GroupNorm(2, 4)),
    "Embedding": Lookup,
    "MultiheadAttention": Attend,
    "raw parameter": Scaled,
    "Conv1d": lambda: Channels(nn.Conv1d(4, 4, 3)),
    "ConvTranspose1d": lambda: Channels(nn.ConvTranspose1d(4, 4, 2)),
    "LSTM": lambda: nn.LSTM(4, 4, batch_first=True),
}


@pytest.mark.parametrize("name", BODIES)
def test_layers_that_stop_all_weights_laplace(name):
    """laplace-torch's K-FAC fails on every one of them; here each parameter has its block."""
    model, x, y = pooled(BODIES[name])
    model.eval()
    with pytest.raises(NotImplementedError, match="un-supported layers"):
        peer.fit(model, "classification", peer.loader(x, y))
    ours = Laplace(model, "classification").fit(peer.loader(x, y))
    assert_complete(ours.curvature, model)
    assert "frozen" not in ours.coverage.values()
    # block by block a part of the GGN, whose diagonal the exact structure has
    exact = Laplace(model, "classification", hessian_structure="diag").fit(peer.loader(x, y))
    names = oracles.trainable(model)
    diagonal = oracles.ggn(model, x, y, "classification", names).diagonal()
    found = {n: b.dense().diagonal() for b in exact.curvature.blocks.values() for n in [b.params]}
    sizes = [model.get_parameter(n).numel() for n in names]
    wanted = dict(zip(names, diagonal.split(sizes), strict=True))
    for params, got in found.items():
        torch.testing.assert_close(got, torch.cat([wanted[n] for n in params]))


def test_the_output_projection_of_attention_is_seen():
    """Hooks on modules never fire for it: its weights go into one fused call."""
    model, x, y = pooled(Attend)
    ours = Curvature(model, "classification", kfac_approx="reduce", joint_bias=False).fit([(x, y)])
    name = "body.attention.out_proj"
    exact = oracles.ggn(model, x, y, "classification", [f"{name}.bias"])
    assert relative_error(ours.blocks[f"{name}.bias"].dense(), exact) < EXACT
    model.body.attention.in_proj_weight.requires_grad_(False)
    model.body.attention.in_proj_bias.requires_grad_(False)
    operator = theirs(model, nn.CrossEntropyLoss(reduction="sum"), x, y, "reduce")
    assert list(operator._gradient_covariances) == ["head"]  # accepted, and left out
    with pytest.raises(KeyError, match=name):
        operator @ torch.ones(operator.shape[1], dtype=torch.float64)


def test_windows_in_the_first_axis_are_no_examples():
    """Reduce sums over all tokens of an example; the peer only within each window."""
    model, x, y = pooled(Windows)
    bias = oracles.ggn(model, x, y, "classification", ["body.lin.bias"])
    ours = Curvature(model, "classification", kfac_approx="reduce", joint_bias=False).fit([(x, y)])
    assert relative_error(ours.blocks["body.lin.bias"].dense(), bias) < EXACT
    operator = theirs(model, nn.CrossEntropyLoss(reduction="sum"), x, y, "reduce")
    assert relative_error(operator._gradient_covariances["body.lin"], bias) > 0.2


def test_factors_under_autocast_are_not_in_half_precision():
    model, x, y = pooled(lambda: nn.Linear(4, 4))
    model, x = model.float(), x.float()
    exact = Curvature(model, "classification", kfac_approx="expand").fit([(x, y)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = Curvature(model, "classification", kfac_approx="expand").fit([(x, y)])
        operator = theirs(model, nn.CrossEntropyLoss(reduction="sum"), x, y)
    for block in ours.blocks.values():
        assert {factor.dtype for factor in block.factors} <= {torch.float32, torch.float64}
    # inputs of the first layer are not rounded: their products must not be either
    got, want = (c.blocks["body.weight"].factors.input for c in (ours, exact))
    assert relative_error(got, want) < 1e-6
    assert operator._input_covariances["body"].dtype == torch.bfloat16


LOSSES = {
    "weight": ({"weight": torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)}, 0.1),
    "ignore_index": ({"ignore_index": 1}, 0.1),
}


@pytest.mark.parametrize("option", LOSSES)
def test_options_of_the_loss_reach_the_curvature(option):
    """The peer's factors are those of the plain loss."""
    model, x, y = pooled(lambda: nn.Linear(4, 4))
    options, off = LOSSES[option]
    ours = Curvature(model, Categorical(**options), kfac_approx="reduce", joint_bias=False)
    got = ours.fit([(x, y)]).blocks["head.bias"].dense()
    f = model(x).detach()
    p = f.softmax(-1)
    m = options.get("weight", torch.ones(CLASSES).double())[y] * (y != options.get("ignore_index"))
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    want = (m[:, None, None] * hessian).sum(0)
    assert relative_error(got, want) < EXACT
    plain = theirs(model, nn.CrossEntropyLoss(reduction="sum"), x, y, "reduce")
    loss = theirs(model, nn.CrossEntropyLoss(reduction="sum", **options), x, y, "reduce")
    torch.testing.assert_close(
        loss._gradient_covariances["head"], plain._gradient_covariances["head"]
    )
    assert relative_error(loss._gradient_covariances["head"], want) > off
