"""When a training loss has settled, and what the tuner does until then."""

import copy
import math

import pytest
import torch
from torch import nn

from kfac_laplace import MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.marglik.burn_in import has_settled


def first_settled(curve, epochs=400):
    """The first epoch at which a curve over epochs has settled, or None."""
    losses = [curve(epoch) for epoch in range(epochs)]
    return next((n for n in range(1, epochs + 1) if has_settled(losses[:n])), None)


def test_an_exponential_settles_where_its_latest_fifth_gains_less_than_three_percent():
    """exp(−t/τ): lately e^{−0.8 t/τ} − e^{−t/τ} of 1 − e^{−t/τ}, which falls below 0.03 once."""
    tau = 20.0
    settled = first_settled(lambda t: math.exp(-t / tau))

    def share(t):
        late = math.exp(-(t - math.ceil(0.2 * (t + 1))) / tau) - math.exp(-t / tau)
        return late / (1 - math.exp(-t / tau))

    assert share(settled - 1) < 0.03 <= share(settled - 2)


def test_the_same_curve_over_more_epochs_settles_at_the_same_place():
    short, long = (first_settled(lambda t, s=s: math.exp(-t / s), 4000) for s in (50.0, 200.0))
    assert long / short == pytest.approx(4, rel=0.03)


@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 2.3 - t / 200,  # still falling
        lambda t: 2.3 + t,
        lambda t: math.nan,
        lambda t: -t * 1.0,  # of a density, still rising
    ],
    ids=["linear", "rising", "nan", "density"],
)
def test_never_settled(curve):
    assert first_settled(curve, 300) is None


@pytest.mark.parametrize("level", [2.3, -1.0])
def test_what_is_flat_for_long_has_settled(level):
    """There is nothing to learn, or it was learned before; not within the first 50 epochs."""
    assert first_settled(lambda t: level + 0.01 * (-1) ** t * abs(level)) in (50, 51, 52, 53)


def test_a_trained_network_has_settled_beside_a_constant_prediction():
    """Fine-tuning begins low: what is left to gain is measured against what a constant has."""
    losses = [0.123 - 0.003 * t / 150 for t in range(20)]
    assert not has_settled(losses)
    assert has_settled(losses, constant=0.69)
    assert not has_settled([0.69 - 1e-4 * t for t in range(20)], constant=0.69)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 1.0, 1e3])
def test_regressions_of_any_scale_settle_alike(spread):
    """By squared residuals beside the spread of the targets, whatever σ begins at."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

        def forward(self, x):
            return spread * self.inside(x)

    x, _ = data(60)
    torch.manual_seed(0)
    model, y = Scaled(), spread * x[:, :1].sin()
    tuner = MarglikTuner(model, "regression", 60, fix_sigma_noise=True, marglik_frequency=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        tuner.loss(model(x), y).backward()
        optimizer.step()
        tuner.step([(x, y)])
    assert tuner._progress.burn_in.over


@pytest.mark.slow
def test_a_loss_that_is_no_number_does_not_count():
    """As of a batch that overflows in half precision, whose step is skipped."""
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", len(x))
    tuner.loss(model(x) * math.inf, y)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(110):
        epoch(tuner, optimizer, x, y)
    assert tuner._progress.burn_in.over


def test_a_density_settles_below_zero():
    assert first_settled(lambda t: -3 + 4 * math.exp(-t / 10)) is not None


def test_a_plateau_before_learning_is_no_end():
    """As transformers have at their start: flat for 30 epochs, then down."""
    settled = first_settled(lambda t: 2.3 if t < 30 else 2.3 * math.exp(-(t - 30) / 10))
    assert settled > 50


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(n=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, x.argmax(1)


def epoch(tuner, optimizer, x, y):
    for part in torch.arange(len(x)).split(8):
        optimizer.zero_grad()
        tuner.loss(tuner.model(x[part]), y[part]).backward()
        optimizer.step()
    return tuner.step([(x, y)])


def delta_of(record):
    return record.hyperparameters["prior_precision"]


@pytest.mark.slow
def test_hyperparameters_move_from_the_epoch_on_in_which_the_loss_has_settled():
    """By the curve of the means of torch's own losses."""
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", len(x), prior_precision=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, moved = [], []
    for _ in range(120):
        fits, before = [], tuner.hyperparameters()["prior_precision"]
        for part in torch.arange(len(x)).split(8):
            optimizer.zero_grad()
            output = model(x[part])
            fits.append(float(nn.functional.cross_entropy(output.detach(), y[part])))
            tuner.loss(output, y[part]).backward()
            optimizer.step()
        losses.append(sum(fits) / len(fits))
        tuner.step([(x, y)])
        moved.append(not torch.equal(before.expand(2), tuner.hyperparameters()["prior_precision"]))
    share = y.bincount().double() / len(y)
    constant = float(-(share * share.log()).sum())
    settled = next(n for n in range(1, 121) if has_settled(losses[:n], constant))
    assert not any(moved[: settled - 1])
    assert all(moved[settled - 1 :])
    assert 5 < settled < 115


def test_rounds_are_recorded_while_hyperparameters_wait(caplog):
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", len(x))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    records = [epoch(tuner, optimizer, x, y) for _ in range(4)]
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    assert all(torch.equal(delta_of(records[0]), delta_of(record)) for record in records[1:])
    assert len({record.evidence for record in records}) == 4
    with caplog.at_level("INFO", logger="kfac_laplace"):
        tuner.laplace([(x, y)])
    assert "in 4 epochs the training loss has not settled" in caplog.text


def test_a_burn_in_of_the_users_own_is_all_there_is():
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", 24, n_epochs_burnin=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    records = [epoch(tuner, optimizer, x, y) for _ in range(5)]
    assert records[:2] == [None, None]
    assert not torch.equal(delta_of(records[3]), delta_of(records[4]))


@pytest.mark.slow
def test_the_round_in_which_they_begin_to_move_takes_five_times_the_steps():
    """Adam's steps on log δ are at most its rate, and all of it in the same direction."""
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", 24, lr_hyp=1e-3, marglik_frequency=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    deltas = [tuner.hyperparameters()["prior_precision"].expand(2)]
    for _ in range(110):
        if epoch(tuner, optimizer, x, y) is not None:
            deltas.append(tuner.hyperparameters()["prior_precision"])
    steps = [(b / a).log().abs().max() / 1e-3 for a, b in zip(deltas, deltas[1:], strict=False)]
    moving = [round(float(step)) for step in steps if step > 0]
    assert moving[:3] == [50, 10, 10]


def test_without_a_loss_there_is_nothing_to_wait_for():
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", len(x))
    one, two = tuner.step([(x, y)]), tuner.step([(x, y)])
    assert not torch.equal(delta_of(one), delta_of(two))


@pytest.mark.slow
def test_losses_of_held_out_data_do_not_count():
    """As validation computes them: without gradients, in evaluation mode."""
    (x, y), found = data(), []
    for looks in (False, True):
        model = network()
        tuner = MarglikTuner(model, "classification", len(x))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            epoch(tuner, optimizer, x, y)
            if looks:
                with torch.no_grad():
                    tuner.loss(100 * model.eval()(x), y)
                model.train()
        found.append([delta_of(record) for record in tuner.history])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("when", [2, 30, pytest.param(90, marks=pytest.mark.slow)])
def test_resumed_in_the_middle_of_an_epoch(when):
    """The sums so far are part of the state."""
    (x, y), model = data(), network()
    tuner = MarglikTuner(model, "classification", len(x), marglik_frequency=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(when):
        epoch(tuner, optimizer, x, y)
    tuner.loss(model(x[:5]), y[:5])
    twin_model = copy.deepcopy(model)
    twin = MarglikTuner(twin_model, "classification", len(x), marglik_frequency=3)
    twin.load_state_dict(copy.deepcopy(tuner.state_dict()))
    twin_optimizer = torch.optim.Adam(twin_model.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(40):
        epoch(tuner, optimizer, x, y)
        epoch(twin, twin_optimizer, x, y)
    assert all(
        a.evidence == b.evidence and torch.equal(delta_of(a), delta_of(b))
        for a, b in zip(tuner.history, twin.history, strict=True)
    )


@pytest.mark.parametrize("n", [50, 1000, 20000])
def test_training_begins_at_a_common_weight_decay(n):
    """10⁻⁴ for each example, half of it times |θ|² in the loss of one; δ is at most 1."""
    model, (x, y) = network(), data()
    loss = MarglikTuner(model, "classification", n).loss(model(x), y)
    squares = sum(p.square().sum() for p in model.parameters())
    decay = min(1e-4, 1 / n)
    expected = nn.functional.cross_entropy(model(x), y) + decay / 2 * squares
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("wrong, error", [(-1, InvalidValue), ("auto", InvalidType)])
def test_no_burn_in(wrong, error):
    with pytest.raises(error):
        MarglikTuner(network(), "classification", 24, n_epochs_burnin=wrong)


def test_training_in_one_call_waits_too():
    x, y = data()
    options = {"optimizer_kwargs": {"lr": 1e-4}, "n_epochs": 4}
    la, *_ = marglik_training(network(), [(x, y)], **options)
    other, *_ = marglik_training(network(), [(x, y)], n_epochs_burnin=1, **options)
    assert float(other.prior_precision.max()) > 2 * float(la.prior_precision.max())


def test_the_loss_in_units_of_residuals():
    """σ² times the loss, for Gaussian noise; others are as they were."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1).double(), *(torch.randn(9, k).double() for k in (3, 1))
    losses = {
        units: MarglikTuner(model, "regression", 9, sigma_noise=0.3, loss_units=units)
        for units in ("nats", "residuals")
    }
    nats, residuals = (tuner.loss(model(x), y) for tuner in losses.values())
    torch.testing.assert_close(residuals, 0.09 * nats)
    labels = MarglikTuner(network(), "classification", 24, loss_units="residuals")
    plain = MarglikTuner(labels.model, "classification", 24)
    x, y = data()
    assert torch.equal(labels.loss(labels.model(x), y), plain.loss(plain.model(x), y))
    with pytest.raises(InvalidValue, match="loss_units"):
        MarglikTuner(model, "regression", 9, loss_units="bits")
