"""The loss takes what `Laplace` takes a model to return, on the axis that is known, or says no."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import build
from taggers import Last, Tagger, labelled
from torch import nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue

N, C = 5, 3
Scores = namedtuple("Scores", ["loss", "logits"])


def expected(model, x, y, delta):
    """Negative log joint over N, by torch's loss of the classes on axis 1 of rows."""
    f = Last(model)(x).flatten(0, -2)
    fit = F.cross_entropy(f, y.flatten(), reduction="sum") / len(x)
    return fit + sum(delta * p.square().sum() for p in model.parameters()) / (2 * N)


def agrees(tuner, model, x, y):
    """The loss and its gradient are those of the formula."""
    delta = tuner.hyperparameters()["prior_precision"].flatten()[0]
    params = list(model.parameters())
    got, want = tuner.loss(model(x), y), expected(model, x, y, delta)
    torch.testing.assert_close(got, want)
    gradients = (torch.autograd.grad(loss, params) for loss in (got, want))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def start(tuner, how, batch):
    """Let the tuner see a batch."""
    if how == "step":
        tuner.step([batch])
    elif how == "prepare":
        tuner.prepare([batch])
    else:
        tuner.loss(tuner.model(batch[0]), batch[1])


@pytest.mark.parametrize("how", ["step", "prepare", "loss"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("positions", [(C,), (4,), (2,), (C, C)])
def test_losses_use_the_axis_that_was_settled(how, axis, positions):
    """By a round, by `prepare`, or by the first loss whose shapes allow one reading."""
    model = Tagger(axis)
    tuner = MarglikTuner(model, "classification", N, prior_structure="scalar")
    start(tuner, how, labelled(N, *([5] * len(positions))))
    for n in (N, 1):
        agrees(tuner, model, *labelled(n, *positions))


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_an_open_axis_is_asked_for_and_then_known(axis, structure):
    model, batch = Tagger(axis), labelled(N, C)
    options = {"prior_structure": "scalar", "hessian_structure": structure}
    tuner = MarglikTuner(model, "classification", N, **options)
    before = repr(tuner.state_dict())
    for refused in (
        lambda: tuner.loss(model(batch[0]), batch[1]),
        lambda: tuner.step([batch]),
        lambda: tuner.prepare([batch]),
        lambda: tuner.laplace([batch]),
    ):
        with pytest.raises(InvalidValue, match="class_axis"):
            refused()
    assert repr(tuner.state_dict()) == before
    given = MarglikTuner(model, "classification", N, class_axis=axis, **options)
    agrees(given, model, *batch)
    given.step([batch])
    agrees(given, model, *batch)


def test_a_loss_that_contradicts_the_axis():
    """Labels for another layout are refused, and the layout stays."""
    model = Tagger(1)
    tuner = MarglikTuner(model, "classification", N, prior_structure="scalar")
    x, y = labelled(N, 4)
    agrees(tuner, model, x, y)
    with pytest.raises(InvalidValue, match="target"):
        tuner.loss(model(x).mT, y)
    with pytest.raises(InvalidValue, match="target"):
        tuner.loss(model(x), torch.zeros(N, C, dtype=torch.long))
    agrees(tuner, model, *labelled(N, C))


@pytest.mark.parametrize("stepped", [True, False])
def test_the_state_keeps_the_axis(stepped, tmp_path):
    model = Tagger(1)
    tuner = MarglikTuner(model, "classification", N, prior_structure="scalar")
    start(tuner, "step" if stepped else "loss", labelled(N, 4))
    torch.save(tuner.state_dict(), tmp_path / "tuner.pt")
    resumed = MarglikTuner(model, "classification", N, prior_structure="scalar")
    resumed.load_state_dict(torch.load(tmp_path / "tuner.pt", weights_only=True))
    agrees(resumed, model, *labelled(N, C))


def test_a_refused_loss_settles_nothing():
    model = Tagger(1)
    tuner = MarglikTuner(model, "classification", N)
    x, y = labelled(N, 4)
    with pytest.raises(InvalidValue, match="labels"):
        tuner.loss(model(x), y + 100)
    assert tuner.state_dict()["class_axis"] is None


# --- what models return ---------------------------------------------------------------------------

FORMS = {
    "object": lambda f: SimpleNamespace(logits=f, hidden=f.exp()),
    "named tuple": lambda f: Scores(f.sum(), f),
    "mapping": lambda f: {"aux": f.exp(), "logits": f},
    "out": lambda f: {"out": f, "aux": f.exp()},
    "tuple": lambda f: (f, None),
    "list": lambda f: [f],
    "state": lambda f: (f, (f, f)),
    "state of a list": lambda f: [f, [f, f], None],
}
forms = pytest.mark.parametrize("form", FORMS)


class Wrapped(nn.Module):
    def __init__(self, network, form):
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        return self.form(self.network(x))


@forms
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary", "tokens"])
def test_the_loss_takes_what_laplace_takes(form, name):
    case = build(name)
    model = Wrapped(case.model, FORMS[form])
    tuner = MarglikTuner(model, case.likelihood, 7, class_axis=-1)
    plain = MarglikTuner(case.model, case.likelihood, 7, class_axis=-1)
    x, y = case.batches[0]
    got, want = tuner.loss(model(x), y), plain.loss(case.model(x), y)
    assert torch.equal(got, want)
    tuner.step(case.batches)
    plain.step(case.batches)
    assert torch.equal(tuner.loss(model(x), y), plain.loss(case.model(x), y))
    la = Laplace(model, case.likelihood, class_axis=-1).fit(case.batches)
    same = Laplace(case.model, case.likelihood, class_axis=-1).fit(case.batches)
    assert torch.equal(la.log_marginal_likelihood(), same.log_marginal_likelihood())


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (lambda f: (f, f.exp()), InvalidType, "model output"),  # mean and variance? two exits?
        (lambda f: [f, f, f], InvalidType, "model output"),
        (lambda f: (f, f.sum(0)), InvalidType, "model output"),
        (lambda f: (f.sum(), f), InvalidType, "model output"),  # a loss before the logits
        (lambda f: (None, f), InvalidType, "model output"),
        (lambda f: None, InvalidType, "model output"),
        (lambda f: (), InvalidType, "model output"),
        (lambda f: {"scores": f}, InvalidType, "model output"),
        (lambda f: f[:2], InvalidValue, "number of examples"),
        (lambda f: f.sum(), InvalidValue, "number of examples"),
    ],
)
def test_what_may_mean_several_things_is_refused_by_both(returned, error, says):
    case = build("mlp-tanh")
    x, y = case.batches[0]
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    with pytest.raises(error, match=says):
        tuner.loss(returned(case.model(x)), y)
    with pytest.raises(error, match=says):
        Laplace(Wrapped(case.model, returned)).fit([(x, y)])


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "mlp-binary"])
def test_an_empty_batch(name):
    """Without it the loss was nan, and so were the weights after it."""
    case = build(name)
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    x, y = case.batches[0]
    with pytest.raises(InvalidValue, match="without examples"):
        tuner.loss(case.model(x[:0]), y[:0])
    with pytest.raises(InvalidValue, match="without examples"):
        Laplace(case.model, case.likelihood).fit([(x[:0], y[:0])])


@pytest.mark.parametrize("target", [[0, 1, 2], None, 3])
def test_targets_are_a_tensor(target):
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, case.likelihood, 7)
    with pytest.raises(InvalidType, match="target"):
        tuner.loss(case.model(case.x), target)
    with pytest.raises(InvalidType, match="target"):
        Laplace(case.model, case.likelihood).fit([(case.x, target)])
