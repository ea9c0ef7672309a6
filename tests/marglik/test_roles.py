"""Which precisions a tuner tunes, by the way the model uses its parameters."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
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


# --- what training mode shows ---------------------------------------------------------------------


def with_batch_norm(outputs=3):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, outputs))


def with_layer_norm():
    return nn.Sequential(
        nn.Linear(4, 6, bias=False),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.ReLU(),
        nn.Linear(6, 3),
    )


class Mixing(nn.Module):
    """Statistics of the batch in training, by no module of torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h - h.mean(0) if self.training else h))


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.dropout(torch.tanh(self.first(x)), 0.5, self.training))


@pytest.mark.parametrize("build", [with_batch_norm, Mixing])
def test_with_batch_statistics_no_precision_is_tuned(build, caplog):
    model = made(build)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        records = trained(model, tuner, [rows()])
    deltas = {float(d) for r in records for d in r.hyperparameters["prior_precision"]}
    assert deltas == {20 * 1e-4}
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "no precision is tuned" in text]) == 1
    assert set(tuner.coverage) == {
        name for name, how in tuner.coverage.items() if "batch statistics" in how
    }


def test_batch_statistics_that_training_does_not_use_do_not_matter():
    """A network trained in evaluation mode, as for fine-tuning."""
    model = made(with_batch_norm).eval()
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    trained(model, tuner, [rows()])
    assert said(tuner, "tuned") == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_noise_is_tuned_with_batch_statistics_too():
    model = made(lambda: with_batch_norm(1))
    x, _ = rows()
    tuner = MarglikTuner(model, "regression", 20, n_epochs_burnin=0)
    trained(model, tuner, [(x, x[:, :1])])
    assert float(tuner.hyperparameters()["sigma_noise"]) != 1
    assert (tuner.hyperparameters()["prior_precision"] == 20 * 1e-4).all()


def test_weights_in_front_of_a_norm_are_held():
    model = made(with_layer_norm)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    trained(model, tuner, [rows()])
    assert said(tuner, "held: its scale changes no output") == {"0.weight"}
    assert said(tuner, "tuned") == {"3.weight", "3.bias"}


@pytest.mark.parametrize("build", [Dropped, Transformer])
def test_dropout_and_norms_elsewhere_leave_the_layers_tuned(build):
    model = made(build)
    loader = [rows() if build is Dropped else sequences()]
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    trained(model, tuner, loader)
    assert not said(tuner, "its scale") and not said(tuner, "batch statistics")
    assert said(tuner, "tuned") >= {n for n, p in model.named_parameters() if p.ndim == 2}


def test_a_layer_without_effect_is_not_called_scale_free():
    """The last matrix of a branch is zero, so that nothing of the branch reaches the output yet."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner, self.outer = (nn.Linear(4, 4) for _ in range(3))
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

        def forward(self, x):
            return self.stem(x) + self.outer(torch.tanh(self.inner(x)))

    model = made(Branch)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    tuner.loss(model(rows()[0]), rows()[1])
    tuner.step([rows()])
    assert not said(tuner, "its scale changes no output")


def test_looking_at_training_mode_leaves_the_model_as_it_was():
    """Running statistics, modes and the global random numbers."""
    model = made(lambda: nn.Sequential(*with_batch_norm()[:3], nn.Dropout(0.5), nn.Linear(6, 3)))
    model[1].momentum = 0.3
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    tuner.loss(model(rows()[0]), rows()[1])
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    tuner.step([rows()])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_examples(n):
    """Batch norm refuses a single example; then its type tells."""
    model = made(with_batch_norm)
    x, y = rows(8)
    tuner = MarglikTuner(model, "classification", 8, n_epochs_burnin=0)
    tuner.loss(model(x), y)
    tuner.step([(x[:n], y[:n]), (x[n:], y[n:])])
    assert said(tuner, "batch statistics") == {n for n, _ in model.named_parameters()}


def test_a_resumed_tuner_tunes_the_same():
    model = made(with_layer_norm)
    tuner = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    trained(model, tuner, [rows()])
    other = MarglikTuner(model, "classification", 20, n_epochs_burnin=0)
    other.load_state_dict(tuner.state_dict())
    assert other.coverage == tuner.coverage
    assert torch.equal(
        *(t.step([rows()]).hyperparameters["prior_precision"] for t in (tuner, other))
    )


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
    options = {"optimizer_kwargs": {"lr": 1e-3}, "n_epochs": 3, "n_epochs_burnin": 0}
    la, *_ = marglik_training(made(Transformer), [sequences()], tune=["head.*"], **options)
    names = [*la.curvature.blocks]
    held = [d for name, d in zip(names, la.prior_precision, strict=True) if name != "head.weight"]
    assert {float(d) for d in held} == {20 * 1e-4}


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_records_tell_what_the_data_determine(structure):
    """γ by group: Σ (1 − δ [P⁻¹]_ii), and the log-likelihood of the class frequencies."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = rows()
    tuner = MarglikTuner(model, "classification", 20, hessian_structure=structure)
    record = tuner.step([(x, y)])
    la = tuner.laplace([(x, y)])
    frequencies = y.bincount(minlength=3).double() / 20
    expected = (y.bincount(minlength=3) * frequencies.log()).nansum()
    assert record.constant_evidence == pytest.approx(float(expected), rel=1e-12)
    found = []
    for name, delta in zip(record.groups, la.prior_precision, strict=True):
        if structure == "full":
            break
        h = la.curvature.blocks[name].dense()
        found.append(
            len(h) - delta * torch.linalg.inv(h + delta * torch.eye(len(h)).double()).trace()
        )
    if structure == "full":
        h = la.curvature.blocks["full"].dense()
        deltas = la.prior_precision.repeat_interleave(torch.tensor([25, 18]))
        variances = torch.linalg.inv(h + deltas.diag()).diagonal()
        found = [part.sum() for part in (1 - deltas * variances).split([25, 18])]
    torch.testing.assert_close(record.effective_dimensions, torch.stack(found), rtol=1e-9, atol=0)


def test_an_evidence_below_that_of_a_constant_is_said_once(caplog):
    """Hardly any data, so that the volume of the prior costs more than they give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3)).double()
    x, y = rows(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    tuner = MarglikTuner(model, "classification", 6, n_hypersteps=1, lr_hyp=1e-3)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        records = [tuner.step([(x, y)]) for _ in range(14)]
    assert records[-1].log_likelihood > records[-1].constant_evidence > records[-1].evidence
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "below that of a constant" in text]) == 1
