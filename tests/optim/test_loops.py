"""Training loops as people write them: one line changes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.optim import KFAC, Damped, Estimate

ALWAYS = {"every": 1, "bases_every": 1}
FISHERS = ["mc", "empirical"]
#: As long as the eigenbases of few examples turn, second moments kept by index say little.
CAREFUL = {"lr": 0.02, "rule": Damped()}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(n, classes, *axes):
    return torch.randint(0, classes, (n, *axes), generator=torch.Generator().manual_seed(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(5, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head, self.checkpointed = nn.Linear(8, 3), checkpointed

    def forward(self, x):
        h = self.into(x)
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        return self.head(h.mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A language model whose head is its table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.inner(self.table(x)).tanh(), self.table.weight)


MODELS = {
    "mlp": (mlp, draws(24, 5), labels(24, 3), {"0.weight", "0.bias", "2.weight", "2.bias"}),
    "batch norm, dropout, in place": (
        convolutions,
        draws(24, 1, 8, 8),
        labels(24, 3),
        {"0.weight", "0.bias", "3.weight", "3.bias", "9.weight", "9.bias"},
    ),
    "transformer": (
        Transformer,
        draws(24, 4, 5),
        labels(24, 3),
        {name for name, _ in Transformer().named_parameters() if "norm" not in name},
    ),
    # A fused call of attention, which would save other tensors as plain calls, stays fused there.
    "checkpoint": (
        lambda: Transformer(True),
        draws(24, 4, 5),
        labels(24, 3),
        {n for n, _ in Transformer().named_parameters() if "norm" not in n and "attn" not in n},
    ),
    "lstm": (
        Recurrent,
        draws(24, 4, 5),
        labels(24, 3),
        {name for name, _ in Recurrent().named_parameters()},
    ),
}


def train(model, optimizer, x, y, steps=12, step=None):
    """The first and the last loss."""
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step() if step is None else step(optimizer)
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", MODELS)
def test_models_learn_and_their_layers_have_factors(name, fisher):
    make, x, y, covered = MODELS[name]
    model = make()
    optimizer = KFAC(model, curvature=Estimate(fisher, every=2, bases_every=2), **CAREFUL)
    torch.manual_seed(0)
    first, last = train(model, optimizer, x, y)
    assert last < 0.8 * first
    assert {n for n, kind in optimizer.coverage.items() if kind == "kfac"} == covered
    captured = {p for block in optimizer.curvature(24).blocks.values() for p in block.params}
    assert captured == covered


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_tied_table_and_a_loss_of_tokens(fisher):
    model, x = Tied(), labels(12, 9, 6)
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x).mT, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.coverage == {
        "table.weight": "adamw", "inner.weight": "kfac", "inner.bias": "kfac"
    }  # fmt: skip
    assert optimizer.settings == {"inner.weight": "expand"}


@pytest.mark.parametrize("fisher", FISHERS)
def test_autocast_in_bfloat16(fisher):
    make, x, y, _ = MODELS["transformer"]
    model = make()
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(b.output_sum.dtype == torch.float32 for b in optimizer.curvature(24).blocks.values())


@pytest.mark.parametrize("fisher", FISHERS)
def test_parameters_in_bfloat16(fisher):
    make, x, y, _ = MODELS["mlp"]
    model = make().bfloat16()
    optimizer = KFAC(model, curvature=Estimate(fisher, **ALWAYS), **CAREFUL)
    first, last = train(model, optimizer, x.bfloat16(), y)
    assert last < 0.8 * first
    assert all(s["m"].dtype == torch.float32 for s in optimizer.state.values())


# --- the step ----------------------------------------------------------------------------------


def same_parameters(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_closure_makes_the_same_steps(fisher):
    make, x, y, _ = MODELS["mlp"]
    plain, closed = make(), make()
    curvature = Estimate(fisher, every=2, bases_every=2)
    train(plain, KFAC(plain, curvature=curvature), x, y)
    optimizer = KFAC(closed, curvature=curvature)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(closed(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    assert same_parameters(plain, closed)


def scaled(model, x, y, optimizer, scaler, unscales, steps=6):
    for _ in range(steps):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize(
    ("fisher", "unscales"), [("mc", False), ("mc", True), ("empirical", False)]
)
def test_a_scaled_loss_makes_the_same_steps(fisher, unscales):
    """A power of two leaves every digit as it is; so does a clip that is far off."""
    make, x, y, _ = MODELS["mlp"]
    plain, amp = make(), make()
    curvature = Estimate(fisher, **ALWAYS)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaled(amp, x, y, KFAC(amp, curvature=curvature), scaler, unscales)
    assert same_parameters(plain, amp)


def test_listening_has_to_know_the_scale():
    make, x, y, _ = MODELS["mlp"]
    model = make()
    optimizer = KFAC(model, curvature=Estimate("empirical", **ALWAYS))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    with pytest.raises(UnsupportedUse, match="unscale"):
        scaled(model, x, y, optimizer, scaler, True)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_step_that_the_scaler_skips_changes_nothing(fisher):
    make, x, y, _ = MODELS["mlp"]
    plain, amp = make(), make()
    curvature = Estimate(fisher, **ALWAYS)
    optimizer = KFAC(amp, curvature=curvature)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    scaler.scale(torch.inf * F.cross_entropy(amp(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same_parameters(plain, amp)
    optimizer.zero_grad()
    optimizer._generator.manual_seed(0)  # labels were drawn for the step that was skipped
    scaled(amp, x, y, optimizer, scaler, False)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=6)
    assert same_parameters(plain, amp)


def test_gradients_that_are_zeroed_take_their_curvature_along():
    """A loop that gives up a step after an exception and goes on with the next batch."""
    make, x, y, _ = MODELS["mlp"]
    plain, broken = make(), make()
    curvature = Estimate("exact", **ALWAYS)
    train(plain, KFAC(plain, curvature=curvature), x, y, steps=3)
    optimizer = KFAC(broken, curvature=curvature)
    F.cross_entropy(broken(3 * x), y).backward()  # the exception comes now, before the step
    train(broken, optimizer, x, y, steps=3)
    # (zero_grad stands after the forward pass of the next batch)
    assert same_parameters(plain, broken)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = mlp()
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    x, y = draws(8, 5), labels(8, 3)
    train(model, optimizer, x, y, steps=2)
    before = copy.deepcopy(model.state_dict())
    model[0].bias.requires_grad_(False)
    model[2].requires_grad_(False)
    train(model, optimizer, x, y, steps=2)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.weight"}
    assert optimizer.coverage["2.weight"] == "frozen"


def test_a_parameter_that_is_trained_later_is_updated():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    x, y = draws(8, 5), labels(8, 3)
    train(model, optimizer, x, y, steps=2)
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    train(model, optimizer, x, y, steps=2)
    assert not torch.equal(before, model[0].weight)
    assert optimizer.coverage["0.weight"] == "adamw"


def test_two_models_with_an_optimiser_each():
    x, y = draws(8, 5), labels(8, 3)
    curvature = Estimate(**ALWAYS)
    alone, first, second = mlp(), mlp(), mlp()
    train(alone, KFAC(alone, curvature=curvature), x, y, steps=4)
    optimizers = [KFAC(first, curvature=curvature), KFAC(second, curvature=curvature)]
    for _ in range(4):
        loss = F.cross_entropy(first(x), y) + F.cross_entropy(second(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same_parameters(alone, first)
    assert same_parameters(alone, second)


def test_two_optimisers_for_the_parts_of_one_model():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    curvature = Estimate(**ALWAYS)
    both = [KFAC(model, params=model[k].parameters(), curvature=curvature) for k in (0, 2)]
    for _ in range(4):
        loss = F.cross_entropy(model(x), y)
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in both:
            optimizer.step()
    for k, optimizer in zip((0, 2), both, strict=True):
        own = {n for n, kind in optimizer.coverage.items() if kind == "kfac"}
        assert own == {f"{k}.weight", f"{k}.bias"}


# --- learning rates and groups -----------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=0.01, total_steps=8, cycle_momentum=False
        ),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    ],
)
def test_schedulers_built_before_the_first_step_move_all_groups(make):
    model, x, y = convolutions(), *MODELS["batch norm, dropout, in place"][1:3]
    other = torch.optim.AdamW(mlp().parameters(), lr=0.01)
    optimizer = KFAC(model)
    schedulers = [make(optimizer), make(other)]
    for _ in range(6):
        train(model, optimizer, x, y, steps=1)
        other.step()
        for scheduler in schedulers:
            scheduler.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert len(optimizer.param_groups) == 1


def test_the_plateau_scheduler():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        train(model, optimizer, x, y, steps=1)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.0025


def test_groups_do_not_change():
    model = mlp()
    optimizer = KFAC(model)
    with pytest.raises(UnsupportedUse, match="do not change"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"params": [nn.Parameter(torch.ones(1))]}, InvalidValue),
        ({"params": [{"params": [], "momentum": 0.9}]}, InvalidValue),
        ({"params": ["weight"]}, InvalidType),
        ({"lr": -0.1}, InvalidValue),
        ({"lr": "fast"}, InvalidType),
        ({"weight_decay": float("nan")}, InvalidValue),
        ({"uncovered": "diag"}, InvalidValue),
        ({"likelihood": "classes"}, InvalidValue),
        ({"kfac_approx": "both"}, InvalidValue),
    ],
)
def test_wrong_options_are_refused(options, error):
    with pytest.raises(error):
        KFAC(mlp(), **options)


@pytest.mark.parametrize(
    "options",
    [{"fisher": "fast"}, {"every": 0}, {"bases_every": 0}, {"ema": 1.5}, {"largest": -1}],
)
def test_wrong_estimates_are_refused(options):
    with pytest.raises(InvalidValue):
        Estimate(**options)


# --- what it says ------------------------------------------------------------------------------


def test_a_model_that_is_never_called_is_told_of(caplog):
    """Its layers are called one by one, which no hook of the whole sees."""
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[1](model[0](x))), y).backward()
            optimizer.step()
    assert [r.getMessage() for r in caplog.records if "no training pass" in r.getMessage()]
    assert len(caplog.records) == 1
    assert set(optimizer.coverage.values()) == {"adamw"}
    with pytest.raises(NotFitted):
        optimizer.curvature(8)


def test_factors_that_come_late_take_over_the_moments():
    """In their own coordinates the steps go on as AdamW's would."""
    x, y = draws(8, 5), labels(8, 3)
    model, want = mlp(), mlp()
    optimizer = KFAC(model, curvature=Estimate(largest=0, **ALWAYS))
    adam = torch.optim.AdamW(want.parameters(), lr=0.01, betas=(0.9, 0.95), foreach=False)
    with optimizer.paused():
        train(model, optimizer, x, y, steps=3)
    train(model, optimizer, x, y, steps=3)
    train(want, adam, x, y, steps=6)
    assert set(optimizer.coverage.values()) == {"kfac"}
    assert same_parameters(model, want)


def test_closed_optimisers_go_on_with_what_they_have():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, curvature=Estimate(**ALWAYS))
    train(model, optimizer, x, y, steps=2)
    before = optimizer.curvature(8).blocks["0.weight"].factors.input
    optimizer.close()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    train(model, optimizer, x, y, steps=2)
    assert torch.equal(before, optimizer.curvature(8).blocks["0.weight"].factors.input)


def test_factors_stay_between_captures():
    model, x, y = mlp(), draws(8, 5), labels(8, 3)
    optimizer = KFAC(model, curvature=Estimate(every=5))
    seen = []
    for _ in range(12):
        train(model, optimizer, x, y, steps=1)
        seen.append(optimizer.curvature(8).blocks["2.weight"].factors.input)
    changed = [1] + [k + 1 for k in range(1, 12) if not torch.equal(seen[k], seen[k - 1])]
    assert changed == [1, 2, 4, 6, 7, 11]


def test_uncovered_parameters_may_be_refused():
    model = nn.Sequential(nn.Linear(5, 3), nn.PReLU())

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.power = model, nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.inner(x).sigmoid() ** self.power

    odd = Odd()
    optimizer = KFAC(odd, uncovered="error")
    with pytest.raises(UnsupportedUse, match="power"):
        train(odd, optimizer, draws(8, 5), labels(8, 3), steps=1)


def test_one_rank_of_a_distributed_run(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        make, x, y, _ = MODELS["mlp"]
        plain, inner = make(), make()
        model = DistributedDataParallel(inner)
        train(plain, KFAC(plain, curvature=Estimate(**ALWAYS)), x, y, steps=4)
        train(model, KFAC(model, curvature=Estimate(**ALWAYS)), x, y, steps=4)
        assert same_parameters(plain, inner)
    finally:
        dist.destroy_process_group()
