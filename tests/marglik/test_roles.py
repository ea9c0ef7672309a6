"""Which precisions a tuner tunes, by the way the model uses its parameters."""

import pytest
import torch
from marglik.small_networks import Transformer, made, moved, rows, said, sequences
from torch import nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue


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
    treated = {name: how.split(", ")[0] for name, how in tuner.coverage.items()}
    assert treated == Laplace(model).fit([sequences()]).coverage


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


def test_frozen_and_unused_parameters_are_called_so():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.still = (nn.Linear(4, 3) for _ in range(3))
            self.still.requires_grad_(False)

        def forward(self, x):
            return self.used(x) + self.still(x)

    tuner = MarglikTuner(made(Spare), "classification", 20)
    assert tuner.coverage == {}
    tuner.step([rows()])
    found = tuner.coverage
    assert (found["used.weight"], found["spare.bias"], found["still.weight"]) == (
        "kron, tuned",
        "unused",
        "frozen",
    )
