"""Models that are built otherwise than at the fit: refused by name, or fitted anew."""

from __future__ import annotations

import logging

import pytest
import torch
from pulls import data, network
from torch import nn

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse


class Adapted(nn.Module):
    """A layer with a low-rank addition, as written by hand."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.up = layer, nn.Linear(3, 3, bias=False).double()

    def forward(self, x):
        return self.layer(x) + self.up(x)


def widen(model):
    model[0], model[2] = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()


def wrap(model):
    model[0] = Adapted(model[0])


def drop(model):
    del model[2]


CHANGES = {
    widen: r"^0\.weight: .*no longer those.*shape \(5, 3\) for \(3, 3\).*new posterior",
    wrap: r"^0\.weight: .*no longer those.*no longer in the model.*new posterior",
    drop: r"^2\.weight: .*no longer those.*no longer in the model",
}
VERBS = {
    "add": lambda la, d: la.fit(d, override=False),
    "accumulate": lambda la, d: la.curvature.accumulate(*d[0]),
    "read": lambda la, d: la.curvature.read(d),
    "call": lambda la, d: la(d[0][0]),
    "nn": lambda la, d: la(d[0][0], pred_type="nn", n_samples=2),
    "linear": lambda la, d: la(d[0][0], pred_type="linear", n_samples=2),
    "joint": lambda la, d: la.functional_samples(d[0][0], 2),
    "loo": lambda la, d: la.calibrate(d),
    "validation": lambda la, d: la.calibrate(d, method="validation"),
    "grid": lambda la, d: la.optimize_prior("gridsearch", val_loader=d, grid=[1.0]),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused_by_name(change, verb, structure):
    torch.manual_seed(0)
    model, d = network(), [data()]
    la = Laplace(model, hessian_structure=structure).fit(d)
    evidence = float(la.log_marginal_likelihood())
    change(model)
    with pytest.raises(InvalidValue, match=CHANGES[change]):
        VERBS[verb](la, d)
    assert float(la.log_marginal_likelihood()) == evidence
    la.fit(d)
    fresh = Laplace(model, hessian_structure=structure).fit(d)
    torch.testing.assert_close(la(d[0][0]), fresh(d[0][0]))


class Rounded(nn.Sequential):
    def __init__(self, to):
        super().__init__(nn.Linear(3, 2).double())
        self.to_kind = to

    def forward(self, x):
        return self.to_kind(super().forward(x))


@pytest.mark.parametrize(
    "to", [torch.Tensor.long, torch.Tensor.int, lambda f: f > 0, lambda f: f.argmax(1)]
)
@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
def test_outputs_that_are_no_real_numbers_are_refused(likelihood, to):
    torch.manual_seed(0)
    model, (x, y) = Rounded(to), data(likelihood)
    refused = pytest.raises(InvalidType, match="^model output: .*floating-point.*before argmax")
    with refused:
        Laplace(model, likelihood).fit([(x, y)])
    with refused:
        Curvature(model, likelihood).accumulate(x, y)
    with refused:
        MarglikTuner(model, likelihood, 12).loss(model(x), y)
    function = {"forward_fn": lambda m, v: to(m[0](v))}
    with refused:
        Laplace(model, likelihood, **function).fit([(x, y)])


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.e, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.c(self.e(h).tanh() if bool((x[:, 0] > 1.2).any()) else h)


def late():
    torch.manual_seed(0)
    x = torch.randn(8, 3).double()
    x[:, 0] = torch.tensor([0.5] * 4 + [2.0] * 4)
    y = torch.arange(8) % 2
    return Late().double(), [(x[:4], y[:4]), (x[4:], y[4:])]


def said(caplog):
    return [r.message for r in caplog.records if "used first in a later batch" in r.message]


@pytest.mark.parametrize("uncovered", ["diag", "freeze"])
def test_a_layer_that_comes_late_is_named_once(caplog, uncovered):
    model, o = late()
    caplog.set_level(logging.INFO, "kfac_laplace")
    la = Laplace(model, uncovered=uncovered).fit([*o, *o])
    assert len(said(caplog)) == 1 and "e.weight, e.bias" in said(caplog)[0]
    assert la.coverage["e.weight"] == {"diag": "diag", "freeze": "frozen"}[uncovered]
    la.fit(o)
    assert len(said(caplog)) == 1


@pytest.mark.parametrize(("structure", "turn"), [("kron", -1), ("diag", 1), ("full", 1)])
def test_nothing_is_said_where_order_does_not_count(caplog, structure, turn):
    model, o = late()
    Laplace(model, hessian_structure=structure).fit(o[::turn])
    assert not said(caplog)


def test_a_layer_that_comes_late_is_refused_where_that_was_asked_for():
    model, o = late()
    with pytest.raises(UnsupportedUse, match=r"^e\.weight, e\.bias: .*later batch.*Begin with"):
        Laplace(model, uncovered="error").fit(o)
    Laplace(model, uncovered="error").fit(o[::-1])
