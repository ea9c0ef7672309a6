"""Parameters without effect on the output: named once, an own word, never a wrong warning."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidValue, UnsupportedUse

STRUCTURES = ("kron", "diag", "full")


class Adapter(nn.Linear):
    """A frozen layer with a low-rank addition, which merges on eval() as the first library does."""

    def __init__(self):
        super().__init__(3, 4)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
        self.merged = False

    def train(self, mode: bool = True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.weight, self.bias)
        return h if self.merged else h + F.linear(F.linear(x, self.down), self.up)


class Merging(nn.Sequential):
    """It and a head."""

    def __init__(self):
        super().__init__(Adapter(), nn.Tanh(), nn.Linear(4, 3))


class Spare(nn.Module):
    """A parameter and a layer that are never used, beside a layer that is."""

    def __init__(self):
        super().__init__()
        self.net, self.idle, self.gain = (
            nn.Linear(3, 3),
            nn.Linear(2, 2),
            nn.Parameter(torch.ones(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Detached(nn.Module):
    """A body run under no_grad, under a trained head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.body(x).tanh()
        return self.head(h)


class Discarded(nn.Module):
    """A layer whose result is thrown away, and one whose result is detached."""

    def __init__(self):
        super().__init__()
        self.net, self.left, self.right = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.left(x)
        return self.net(x) + self.right(x).detach()


class Experts(nn.Module):
    """Two layers, of which the sign of a batch's mean chooses one; a third is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        positive = x[:, 0] > 0
        found = x.new_zeros(len(x), 3)
        for mask, expert in ((positive, self.experts[0]), (~positive, self.experts[1])):
            if bool(mask.any()):
                found = found.index_put((mask,), expert(x[mask]))
        return found


UNUSED = {
    Merging: {"0.down", "0.up"},
    Spare: {"idle.weight", "idle.bias", "gain"},
    Detached: {"body.weight", "body.bias"},
    Discarded: {"left.weight", "left.bias", "right.weight", "right.bias"},
    Experts: {"experts.2.weight", "experts.2.bias"},
}


def data(n: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Batches of which the first has positive first inputs alone."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    x[: n // 2, 0], x[n // 2 :, 0] = x[: n // 2, 0].abs(), -x[n // 2 :, 0].abs()
    y = torch.randint(0, 3, (n,), generator=draw)
    return [(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])]


def network(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().double()


def unused(coverage: dict[str, str]) -> set[str]:
    return {name for name, kind in coverage.items() if kind == "unused"}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said of parameters without effect; that a layer is late is told elsewhere."""
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [message for message in said if not message.startswith("used first in a later batch")]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("make", UNUSED)
def test_named_once_a_fit_and_in_coverage(make, structure, caplog):
    la = Laplace(network(make), hessian_structure=structure).fit(data())
    assert unused(la.coverage) == UNUSED[make]
    (said,) = warnings(caplog)
    assert all(name in said for name in UNUSED[make])
    others = set(la.coverage) - UNUSED[make]
    assert not any(f" {name}," in said or f" {name}." in said for name in others)
    la.fit(data()[:1], override=False)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_a_later_batch_uses_is_used(structure, caplog):
    """The first batch goes to the first expert alone: no wrong warning, and the exact diagonal."""
    model = network(Experts)
    la = Laplace(model, hessian_structure=structure).fit(data())
    assert la.coverage["experts.1.weight"] == ("dense" if structure == "full" else "diag")
    assert "experts.1" not in warnings(caplog)[0]
    x, y = data()[1]
    p = model(x).softmax(1).detach()
    rows = p * (1 - p)  # Λ's diagonal, by example and class
    want = rows.T @ x.square()
    block = la.curvature.blocks["full" if structure == "full" else "experts.1.weight"].dense()
    start = 12 if structure == "full" else 0
    torch.testing.assert_close(block.diagonal()[start : start + 9], want.flatten())
    swapped = Laplace(network(Experts), hessian_structure=structure).fit(data()[::-1])
    assert unused(swapped.coverage) == UNUSED[Experts]


def test_override_false_and_merge_add_uses_too(caplog):
    first, second = data()
    la = Laplace(network(Experts), hessian_structure="diag").fit([first])
    assert unused(la.coverage) == UNUSED[Experts] | {"experts.1.weight", "experts.1.bias"}
    la.fit([second], override=False)
    assert unused(la.coverage) == UNUSED[Experts]
    assert len(warnings(caplog)) == 1
    model = network(Spare)
    one, two = (Curvature(model, "classification").fit([batch]) for batch in data())
    assert unused(one.merge(two).coverage) == UNUSED[Spare]


def test_saved_and_loaded(tmp_path, caplog):
    model = network(Spare)
    la = Laplace(model).fit(data())
    la.save(tmp_path / "la.pt")
    caplog.clear()
    loaded = Laplace.load(tmp_path / "la.pt", model)
    assert loaded.coverage == la.coverage
    loaded.fit(data(), override=False)
    assert not caplog.records


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batch_by_batch(structure, caplog):
    """The first batch's unused parameters are named as such; coverage follows what comes."""
    curvature = Curvature(network(Experts), "classification", hessian_structure=structure)
    for x, y in data():
        curvature.accumulate(x, y)
    assert unused(curvature.coverage) == UNUSED[Experts]
    (said,) = warnings(caplog)
    assert "first batch" in said


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_with_an_effect_is_an_error(structure, by_hand):
    class Blind(Detached):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    curvature = Curvature(network(Blind), "classification", hessian_structure=structure)
    with pytest.raises(InvalidValue, match="no parameter has an effect"):
        curvature.accumulate(*data()[0]) if by_hand else curvature.fit(data())
    if by_hand:
        assert not curvature.blocks and curvature.n_data == 0
    la = Laplace(network(Spare), subset_of_weights=["idle.*"], hessian_structure=structure)
    with pytest.raises(InvalidValue, match="no parameter has an effect"):
        la.fit(data())
    with pytest.raises(InvalidValue, match="no parameter has an effect"):
        MarglikTuner(network(Blind), "classification", 12).step(data())


def test_what_no_rule_covers_is_refused_when_it_is_used(caplog):
    """uncovered="error" is about uses: a spare parameter has none, an expert may have one later."""
    Laplace(network(Spare), uncovered="error").fit(data())
    assert "gain" in warnings(caplog)[0]
    la = Laplace(network(Experts), uncovered="error")
    with pytest.raises(UnsupportedUse, match=r"experts\.1\.weight"):
        la.fit(data())


def test_frozen_ones_are_named_too(caplog):
    la = Laplace(network(Spare), uncovered="freeze").fit(data())
    assert {la.coverage[name] for name in UNUSED[Spare]} == {"frozen"}
    assert "gain" in warnings(caplog)[0]


def test_the_tuner_names_them_once(caplog):
    """Not when it reads one batch, which may show too little, and not in every round."""
    tuner = MarglikTuner(network(Experts), "classification", 12)
    tuner.prepare(data())
    assert not warnings(caplog)
    for _ in range(3):
        tuner.step(data())
    tuner.laplace(data())
    assert len([text for text in warnings(caplog) if "no effect" in text]) == 1
