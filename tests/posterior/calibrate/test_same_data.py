"""Leave-one-out is over the data of the fit: others, as many, are told by their targets."""

from __future__ import annotations

import pytest
import torch
from cases import build
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.calibrate import leave_one_out

SAYS = "the data of the fit, all of them.*other targets.*method='validation'"


def data(likelihood: str, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 3, dtype=torch.float64, generator=draw)
    if likelihood == "classification":
        return x, torch.randint(0, 2, (40,), generator=draw)
    if likelihood == "binary":
        return x, torch.randint(0, 2, (40, 2), generator=draw).double()
    return x, torch.randn(40, 2, dtype=torch.float64, generator=draw)


def fitted(likelihood: str, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x, y = data(likelihood)
    x, y = x.to(dtype), y.to(dtype) if likelihood == "regression" else y
    return Laplace(model, likelihood, **options).fit([(x, y)]), x, y


LIKELIHOODS = ["regression", "classification", "binary"]


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_other_targets_are_refused(likelihood, structure):
    la, _, y = fitted(likelihood, hessian_structure=structure)
    before = float(la.posterior_scale)
    others = [data(likelihood, 5)]
    if likelihood == "regression":
        others += [(others[0][0], 5 * y), (others[0][0], y + 1e-3)]
    for other in others:
        with pytest.raises(InvalidValue, match=SAYS):
            la.calibrate([other], "loo")
    assert float(la.posterior_scale) == before


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_order_and_batches_may_differ(likelihood, dtype):
    la, x, y = fitted(likelihood, dtype)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    la.calibrate([(x[part], y[part]) for part in order.split(7)])
    la.calibrate([(x, y)])


def test_other_targets_are_told_where_not_all_points_are_looked_at(monkeypatch):
    monkeypatch.setattr(leave_one_out, "MAX_ROWS", 8)
    la, x, y = fitted("regression")
    la.calibrate([(x, y)])
    with pytest.raises(InvalidValue, match=SAYS):
        la.calibrate([(x, y + 0.1)], "loo")


def test_inputs_that_are_augmented_at_random_may_differ():
    la, x, y = fitted("regression")
    la.calibrate([(x + 0.1 * torch.randn(x.shape).to(x), y)], "loo")


@pytest.mark.parametrize(("fit_in", "read_in"), [(True, False), (False, True), (True, True)])
def test_autocast_may_round_the_targets(fit_in, read_in):
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 2), (part.float() for part in data("regression"))
    la = Laplace(model, "regression")
    with torch.autocast("cpu", torch.bfloat16, enabled=fit_in):
        la.fit([(x, y)])
    with torch.autocast("cpu", torch.bfloat16, enabled=read_in):
        la.calibrate([(x, y)])


def test_after_loading(tmp_path):
    la, x, y = fitted("regression")
    la.save(tmp_path / "la.pt")
    again = Laplace.load(tmp_path / "la.pt", la.model)
    again.calibrate([(x, y)])
    with pytest.raises(InvalidValue, match=SAYS):
        again.calibrate([(x, 5 * y)], "loo")


def test_likelihoods_without_sums_over_targets_are_not_checked():
    case = build("mlp-regression")
    la = Laplace(case.model, "studentt").fit([(case.x, case.y)])
    assert not la.curvature.ggn.targets.numel()
    la.calibrate([(case.x, -case.y)], "loo")
