"""Where an example's gradients cancel, "auto" takes expand, and a chosen reduce is warned of."""

from __future__ import annotations

import pytest
import torch
from laws import fitted, seeded_case
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.estimate.settings import of_part


class Packed(nn.Module):
    """Queries, keys and values in one weight, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Compared(nn.Module):
    """A network used several times for an example, and what is made of its outputs."""

    def __init__(self, net: nn.Module, compare) -> None:
        super().__init__()
        self.net, self.compare = net, compare

    def forward(self, *items: Tensor) -> Tensor:
        return self.compare(*(self.net(item) for item in items))


class Bag(nn.Module):
    """Tokens through two layers, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.b(self.a(x).tanh()).tanh().mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


COMPARISONS = {
    "difference": (perceptron, 2, lambda f, g: f - g),
    "distance": (perceptron, 2, lambda f, g: (f - g).abs()),
    "margin": (perceptron, 3, lambda f, g, h: f - torch.maximum(g, h)),
    "triplet": (perceptron, 3, lambda f, g, h: (f - g).square() - (f - h).square()),
    "difference of bags": (Bag, 2, lambda f, g: f - g),
}
SUMS = {
    "sum": (perceptron, 2, lambda f, g: f + g),
    "sum of bags": (Bag, 2, lambda f, g: f + g),
}


def compared(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    """A model, its inputs and binary labels."""
    torch.manual_seed(0)
    make, count, compare = (COMPARISONS | SUMS)[name]
    shape = (60, 5, 3) if make is Bag else (60, 3)
    model = Compared(make(), compare)
    return (
        model,
        tuple(torch.randn(shape) for _ in range(count)),
        torch.randint(0, 2, (60, 1)) * 1.0,
    )


def jacobians(model: nn.Module, items: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """∂f_n/∂θ (n, *shape) by parameter, example by example with plain autograd."""
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(
            model(*(item[k : k + 1] for item in items)).sum(), list(params.values())
        )
        for k in range(len(items[0]))
    ]
    return {name: torch.stack(grads) for name, *grads in zip(params, *rows, strict=True)}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_keep_their_curvature(name, caplog):
    """The exact trace and the exact logit variance come from plain autograd.

    Cross terms of uses are left out by expand, and nothing better is promised than a factor; under
    reduce the traces were off by 30 and more, the variance by 10.
    """
    model, items, y = compared(name)
    make, _, _ = COMPARISONS[name]
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        la = Laplace(model, "binary").fit([(items, y)])
    assert not caplog.records
    jacobian = jacobians(model, items)
    p = model(*items).sigmoid().detach()[:, 0]
    exact = {k: torch.einsum("n,nj->", p * (1 - p), j.flatten(1) ** 2) for k, j in jacobian.items()}
    for name, block in la.curvature.blocks.items():
        assert la.curvature.settings[name] == "expand"
        trace = block.dense().diagonal()[: jacobian[name][0].numel()].sum()  # the weight's alone
        # Of two bags the features differ little from each other, and expand counts each whole.
        assert 0.4 < trace / exact[name] < (30 if make is Bag else 3)
    flat = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    precision = torch.einsum("n,ni,nj->ij", p * (1 - p), flat, flat) + torch.eye(flat.shape[1])
    exact_variance = torch.einsum("ni,ij,nj->n", flat, precision.inverse(), flat).mean()
    assert 0.8 < la.predict(items).covariance.mean() / exact_variance < 2.6


@pytest.mark.parametrize("name", SUMS)
def test_uses_that_add_up_stay_with_reduce(name):
    model, items, y = compared(name)
    assert set(Curvature(model, "binary").fit([(items, y)]).settings.values()) == {"reduce"}


@pytest.mark.parametrize("batches", [[60], [30, 30], [4, 56], [1, 59]])
def test_settings_do_not_depend_on_the_first_batch(batches):
    model, items, y = compared("difference")
    parts = list(zip(*(t.split(batches) for t in (*items, y)), strict=True))
    found = Curvature(model, "binary").fit([(part[:-1], part[-1]) for part in parts])
    assert set(found.settings.values()) == {"expand"}


def test_reduce_says_where_it_sees_no_curvature(caplog):
    """Softmax ignores a shift of all keys, so their gradients cancel over the tokens."""
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        fitted("vit", kfac_approx="expand")
        assert not caplog.records
        reduce = fitted("vit", kfac_approx="reduce")
    assert len(caplog.records) == 1 and "attention.k.weight" in caplog.text
    assert "attention.q" not in caplog.text and "'expand'" in caplog.text
    assert reduce.blocks["attention.k.weight"].factors.output.abs().max() < 1e-12
    caplog.clear()
    fitted("vit", kfac_approx={"*attention.k*": "expand", "*": "auto"})
    assert not caplog.records


def test_auto_gives_keys_expand(caplog):
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        found, expand = fitted("vit", kfac_approx="auto"), fitted("vit", kfac_approx="expand")
    assert not caplog.records
    wanted = {name: "expand" if ".k." in name else "reduce" for name in found.settings}
    assert found.settings == wanted and "expand" in wanted.values()
    key = "attention.k.weight"
    assert torch.equal(found.blocks[key].dense(), expand.blocks[key].dense())


def test_reduce_sees_the_keys_of_a_packed_projection_vanish(caplog):
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        fitted(seeded_case(Packed, (3, 4)), kfac_approx="reduce")
    assert len(caplog.records) == 1 and "attention.in_proj_weight" in caplog.text


def test_the_keys_of_a_packed_projection_alone_take_expand(caplog, tmp_path):
    """Each third of the block is that of the setting chosen for it."""
    case, name = seeded_case(Packed, (3, 4)), "attention.in_proj_weight"
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        mixed = fitted(case)
        assert not caplog.records
        expand, reduce = fitted(case, kfac_approx="expand"), fitted(case, kfac_approx="reduce")
    assert mixed.settings[name] == ("reduce", "expand", "reduce")
    a, b = mixed.blocks[name].factors
    for part, setting in enumerate(mixed.settings[name]):
        same = (expand if setting == "expand" else reduce).blocks[name].factors
        assert torch.equal(a[part], same.input[part]) and torch.equal(b[part], same.output[part])


def test_a_setting_of_parts_survives_saving(tmp_path):
    case, name = seeded_case(Packed, (3, 4)), "attention.in_proj_weight"
    la = Laplace(case.model, "classification").fit(case.batches)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", case.model)
    assert [of_part(loaded.curvature.settings[name], part) for part in range(3)] == [
        "reduce",
        "expand",
        "reduce",
    ]
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    loaded.fit(case.batches, override=False)  # two of each


class Scored(nn.Module):
    """A score for each of several items, chosen between by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[..., 0]


def test_items_between_which_the_loss_chooses(caplog):
    """Softmax does not see a shift of all scores: the gradients cancel through Λ."""
    torch.manual_seed(0)
    model, x, y = Scored(), torch.randn(60, 4, 3), torch.randint(0, 4, (60,))
    found = Curvature(model, "classification").fit([(x, y)])
    assert set(found.settings.values()) == {"expand"}
    p = model(x).softmax(-1).detach()
    rows = [
        torch.autograd.grad(model(x[k : k + 1])[0, c], model.net[2].weight)[0][0]
        for k in range(60)
        for c in range(4)
    ]
    jacobian = torch.stack(rows).unflatten(0, (60, 4))  # (n, c, i)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("nci,ncd,ndi->", jacobian, hessian, jacobian)
    got = found.blocks["net.2.weight"].dense().diagonal()[:8].sum()
    assert 0.5 < got / exact < 2.5


class Fused(nn.Module):
    """Queries, keys and values among the outputs of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.head = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.inner(x).tanh()).chunk(3, -1)
        return self.head(((q @ k.mT).softmax(-1) @ v).mean(1))


def test_keys_among_the_outputs_of_one_layer(caplog):
    """A third of its outputs cancels: the layer takes expand, and a chosen reduce is warned of."""
    torch.manual_seed(0)
    model, x, y = Fused(), torch.randn(30, 5, 3), torch.randint(0, 3, (30,))
    with caplog.at_level("WARNING", logger="kfac_laplace"):
        found = Curvature(model, "classification", joint_bias=False).fit([(x, y)])
        assert not caplog.records
        Curvature(model, "classification", kfac_approx="reduce").fit([(x, y)])
    assert len(caplog.records) == 1 and "qkv.weight" in caplog.text
    assert found.settings["qkv.weight"] == "expand" and found.settings["inner.weight"] == "reduce"
    diag = Curvature(model, "classification", joint_bias=False, hessian_structure="diag")
    exact = diag.fit([(x, y)]).blocks["qkv.weight"].values.reshape(3, -1).sum(1)
    thirds = found.blocks["qkv.weight"].dense().diagonal().view(3, -1).sum(1)
    assert (thirds / exact).min() > 0.3 and (thirds / exact).max() < 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4, 12])
def test_keys_are_told_in_every_precision_and_number(dtype, n):
    case, name = seeded_case(Packed, (3, 4)), "attention.in_proj_weight"
    model = case.model.to(dtype)
    x, y = case.batches[0]
    x = torch.cat([x] * 4)[:n].to(dtype)
    found = Curvature(model, "classification").accumulate(x, torch.cat([y] * 4)[:n])
    assert found.settings[name] == ("reduce", "expand", "reduce")


def test_examples_without_a_label_decide_nothing():
    torch.manual_seed(0)
    model, x, y = Packed(), torch.randn(40, 3, 4), torch.randint(0, 3, (40,))
    y[:20] = -100
    found = Curvature(model, "classification").fit([(x, y)])
    assert found.settings["attention.in_proj_weight"] == ("reduce", "expand", "reduce")
