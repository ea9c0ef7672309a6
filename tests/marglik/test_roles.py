"""Which precisions a tuner tunes, by the way the model uses its parameters."""

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue


class Transformer(nn.Module):
    """A class token, learned positions, norms with gains, attention and a head; float64."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(0.02 * torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        tokens = self.embed(x)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        z = self.norm(tokens)
        mixed = self.attention(z, z, z, need_weights=False)[0]
        return self.head((tokens + self.scale * mixed).mean(1))


def sequences(n=20):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, 3, generator=generator, dtype=torch.float64)
    return x, x.sum(1).argmax(1)


def rows(n=20, targets=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, x[:, :targets].argmax(1)


def made(build):
    torch.manual_seed(0)
    return build().double()


def moved(tuner, loader):
    """Names of the groups whose precision a round moved."""
    tuner.prepare(loader)
    before = tuner.hyperparameters()["prior_precision"].expand(len(tuner.groups))
    tuner.step(loader)
    after = tuner.hyperparameters()["prior_precision"]
    return {name for name, a, b in zip(tuner.groups, before, after, strict=True) if a != b}


def trained(model, tuner, loader, epochs=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    records = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        records.append(tuner.step(loader))
    return records


def said(tuner, reason):
    return {name for name, how in tuner.coverage.items() if reason in how}


def test_matrices_of_layers_are_tuned_and_all_else_is_held():
    model = made(Transformer)
    tuner = MarglikTuner(model, "classification", 20)
    layers = {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    assert moved(tuner, [sequences()]) == layers
    others = {"token", "position", "norm.weight", "norm.bias", "scale"}
    assert said(tuner, "held: no matrix of a layer") == others
    assert said(tuner, "tuned") == {n for n, _ in model.named_parameters()} - others
    assert tuner.coverage.keys() == Laplace(model).fit([sequences()]).coverage.keys()


def test_what_is_held_stays_at_its_initial_value():
    model, start = made(Transformer), {"*norm*": 3.0, "position": 7.0, "*": 0.5}
    tuner = MarglikTuner(model, "classification", 20, prior_precision=start)
    tuner.prepare([sequences()])
    for _ in range(3):
        tuner.step([sequences()])
    deltas = dict(zip(tuner.groups, tuner.hyperparameters()["prior_precision"], strict=True))
    held = {"norm.weight": 3.0, "position": 7.0, "token": 0.5, "scale": 0.5}
    assert {name: float(deltas[name]) for name in held} == held


@pytest.mark.parametrize(
    "tune, expected",
    [
        ("all", None),
        (["head.*"], {"head.weight"}),
        (["head.bias"], {"head.weight"}),  # by its partner in the block
        (["*norm*", "position"], {"norm.weight", "position"}),
    ],
)
def test_tune_overrides_the_roles(tune, expected):
    model = made(Transformer)
    tuner = MarglikTuner(model, "classification", 20, tune=tune)
    expected = expected or {*Laplace(model).fit([sequences()]).curvature.blocks}
    assert moved(tuner, [sequences()]) == expected
    if tune != "all":
        assert said(tuner, "held: not in tune")


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_roles_do_not_depend_on_the_structure(structure):
    tuner = MarglikTuner(made(Transformer), "classification", 20, hessian_structure=structure)
    layers = {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    assert moved(tuner, [sequences()]) == layers


@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_one_precision_for_all_is_tuned_where_any_layer_shares_it(method):
    options = {"prior_structure": "scalar", "method": method}
    tuner = MarglikTuner(made(Transformer), "classification", 20, **options)
    before = tuner.hyperparameters()["prior_precision"]
    tuner.step([sequences()])
    assert not torch.equal(tuner.hyperparameters()["prior_precision"], before.reshape(1))


def test_biases_alone_are_held():
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    tuner = MarglikTuner(model, "classification", 20, joint_bias=False)
    assert moved(tuner, [rows()]) == {"0.weight", "2.weight"}
    assert said(tuner, "held: a bias alone") == {"0.bias", "2.bias"}


class Table(nn.Module):
    def __init__(self, spread):
        super().__init__()
        self.table = nn.Embedding(6, 4)
        nn.init.normal_(self.table.weight, std=spread)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).mean(1)))


@pytest.mark.parametrize("spread, is_tuned", [(1.0, True), (0.02, False)])
def test_tables_by_where_they_began(spread, is_tuned):
    """Also once they have grown."""
    model = made(lambda: Table(spread))
    tuner = MarglikTuner(model, "classification", 20)
    with torch.no_grad():
        model.table.weight.mul_(10 if spread < 1 else 0.01)
    x = torch.randint(6, (20, 3), generator=torch.Generator().manual_seed(0))
    assert ("table.weight" in moved(tuner, [(x, x[:, 0] % 3)])) is is_tuned


def test_matrices_near_zero_wait_until_they_have_grown():
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    tuner = MarglikTuner(model, "classification", 20)
    assert moved(tuner, [rows()]) == {"0.weight"}
    assert said(tuner, "held: a matrix near zero") == {"2.weight", "2.bias"}
    with torch.no_grad():
        model[2].weight.mul_(1e3)
    assert moved(tuner, [rows()]) == {"0.weight", "2.weight"}


class Scales(nn.Module):
    """Nothing but scales and shifts."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.randn(4)) for _ in range(2))

    def forward(self, x):
        return x * self.scale + self.shift


def test_a_model_without_layers_is_tuned_as_it_is():
    tuner = MarglikTuner(made(Scales), "classification", 20)
    assert moved(tuner, [rows()]) == {"scale", "shift"}


def test_a_state_of_other_choices_is_refused():
    tuner = MarglikTuner(made(Transformer), "classification", 20, tune=["head.*"])
    other = MarglikTuner(made(Transformer), "classification", 20)
    with pytest.raises(InvalidValue, match="tune"):
        other.load_state_dict(tuner.state_dict())


@pytest.mark.parametrize(
    "wrong, error",
    [("some", InvalidValue), (["nothing.*"], InvalidValue), (3, InvalidType), ([3], InvalidType)],
)
def test_no_choice(wrong, error):
    with pytest.raises(error):
        MarglikTuner(made(Transformer), "classification", 20, tune=wrong)


def test_training_in_one_call_takes_the_choice():
    options = {"optimizer_kwargs": {"lr": 1e-3}, "n_epochs": 3, "n_epochs_burnin": 1}
    la, *_ = marglik_training(made(Transformer), [sequences()], tune=["head.*"], **options)
    names = [*la.curvature.blocks]
    held = [d for name, d in zip(names, la.prior_precision, strict=True) if name != "head.weight"]
    assert {float(d) for d in held} == {20 * 1e-4}
