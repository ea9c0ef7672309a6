"""A fit is stored with the options of its loss and never mixed with a fit under another loss."""

from __future__ import annotations

import pytest
import torch
from cases import build

from kfac_laplace import Bernoulli, Categorical, Curvature, Laplace
from kfac_laplace.errors import InvalidValue

LOSSES = {
    "categorical": (
        "mlp-tanh",
        Categorical(ignore_index=1, weight=torch.tensor([0.1, 1.0, 2.0]), label_smoothing=0.3),
    ),
    "bernoulli": ("mlp-binary", Bernoulli(pos_weight=0.3)),
}
each = pytest.mark.parametrize(("name", "likelihood"), LOSSES.values(), ids=LOSSES.keys())


@each
def test_a_file_holds_the_options(name, likelihood, tmp_path):
    case = build(name)
    la = Laplace(case.model, likelihood).fit(case.batches[:2])
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", case.model)
    assert loaded.likelihood.options() == likelihood.options()
    for fitted in (la, loaded):
        fitted.fit(case.batches[2:], override=False)
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())


@each
def test_a_state_of_another_loss_is_refused(name, likelihood):
    case = build(name)
    state = Laplace(case.model, likelihood).fit(case.batches).state_dict()
    other = Laplace(case.model, case.likelihood)
    with pytest.raises(InvalidValue, match="likelihood"):
        other.load_state_dict(state)
    same = Laplace(case.model, type(likelihood)(**likelihood.options()))
    same.load_state_dict(state)
    assert same.n_data == 7


@each
def test_curvatures_of_different_losses_do_not_add(name, likelihood):
    case = build(name)

    def fitted(kind):
        return Curvature(case.model, kind).fit(case.batches)

    with pytest.raises(InvalidValue, match="likelihoods"):
        fitted(likelihood).merge(fitted(case.likelihood))
    again = type(likelihood)(**likelihood.options())
    assert fitted(likelihood).merge(fitted(again)).n_data == 14
