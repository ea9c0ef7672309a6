"""Data are added to a posterior only while the model trains the parameters that it is over."""

from __future__ import annotations

import pytest
import torch
from pulls import N, data, network
from torch import nn
from torch.nn.utils import parametrizations

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue

structures = pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])


@structures
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m[0].requires_grad_(False), r"0\.weight.*frozen"),
        (lambda m: m[4].bias.requires_grad_(False), r"4\.bias.*frozen"),
        (lambda m: setattr(m[2], "bias", None), r"2\.bias.*no longer"),
        (lambda m: m.append(nn.Linear(2, 2).double()), r"5\.weight.*trained now"),
        (lambda m: parametrizations.weight_norm(m[2]), r"2\.|parametrizations"),
    ],
    ids=["layer", "bias", "gone", "more", "parametrised"],
)
def test_data_are_not_added_to_a_posterior_over_other_parameters(structure, change, name):
    model, (x, y) = network(), data()
    la = Laplace(model, hessian_structure=structure).fit([(x, y)])
    before = {key: block.dense().clone() for key, block in la.curvature.blocks.items()}
    change(model)
    with pytest.raises(InvalidValue, match=name):
        la.fit([(x, y)], override=False)
    assert la.n_data == N
    assert all(torch.equal(b.dense(), before[key]) for key, b in la.curvature.blocks.items())
    assert Laplace(model, hessian_structure=structure).fit([(x, y)]).n_data == N


def test_data_are_added_once_the_parameters_are_as_they_were():
    model, (x, y) = network(), data()
    la = Laplace(model).fit([(x, y)])
    before = la(x)
    model[0].requires_grad_(False)
    torch.testing.assert_close(la(x), before)  # predictions know which were uncertain
    model[0].requires_grad_(True)
    assert la.fit([(x, y)], override=False).n_data == 2 * N
