"""A second fit over other parameters: precisions go on by name, new groups start as was given."""

from __future__ import annotations

import pytest
import torch
from cases import build
from pulls import data, network

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue

structures = pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
START = 2.5


def fitted(structure="kron", likelihood="classification", freeze=(), **options):
    torch.manual_seed(0)
    model, d = network(), [data(likelihood)]
    for k in freeze:
        model[k].requires_grad_(False)
    options = {"prior_precision": START} | options
    return Laplace(model, likelihood, hessian_structure=structure, **options).fit(d), model, d


def afresh(la, model, d, deltas):
    """The posterior of a fit that knows nothing of an earlier one."""
    made = Laplace(
        model,
        la.likelihood,
        hessian_structure=la.options.hessian_structure,
        prior_precision=torch.tensor(deltas, dtype=torch.float64),
        sigma_noise=la.sigma_noise,
    )
    return made.fit(d)


def assert_same(la, model, d, deltas):
    want = afresh(la, model, d, deltas)
    torch.testing.assert_close(la.prior_precision, want.prior_precision, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        la.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
@structures
def test_one_number_stays_one_number(structure, likelihood):
    la, model, d = fitted(structure, likelihood)
    model[0].requires_grad_(False)
    assert_same(la.fit(d), model, d, [START] * 2)
    model[0].requires_grad_(True)
    assert_same(la.fit(d), model, d, [START] * 3)


@structures
def test_vectors_go_on_by_name(structure):
    la, model, d = fitted(structure, prior_precision=torch.tensor([1.0, 2.0, 3.0]))
    model[2].requires_grad_(False)
    assert_same(la.fit(d), model, d, [1.0, 3.0])


@structures
def test_what_was_optimised_goes_on_and_new_groups_start_as_given(structure):
    la, model, d = fitted(structure, freeze=[0])
    la.optimize_prior(n_steps=3)
    found = la.prior_precision.tolist()
    assert START not in found
    model[0].requires_grad_(True)
    assert_same(la.fit(d), model, d, [START, *found])


def test_a_weight_and_its_bias_that_part_keep_their_precision():
    la, model, d = fitted(prior_precision=torch.tensor([1.0, 2.0, 3.0]))
    model[2].bias.requires_grad_(False)
    assert_same(la.fit(d), model, d, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("given", [4.0, torch.tensor(4.0), {"*": 4.0}])
def test_vectors_have_no_value_for_new_groups_and_the_remedy_helps(given):
    la, model, d = fitted(freeze=[0], prior_precision=torch.tensor([1.0, 2.0]))
    model[0].requires_grad_(True)
    before = float(la.log_marginal_likelihood())
    with pytest.raises(InvalidValue, match=r"^0\.weight, 0\.bias: .*no value.*one number"):
        la.fit(d)
    assert float(la.log_marginal_likelihood()) == before
    la.prior_precision = given
    assert_same(la.fit(d), model, d, [4.0] * 3)


def test_values_handed_to_the_evidence_count_as_given():
    la, model, d = fitted(freeze=[0])
    la.log_marginal_likelihood(prior_precision=7.0)
    model[0].requires_grad_(True)
    assert_same(la.fit(d), model, d, [7.0] * 3)
    la.prior_precision = torch.tensor([1.0, 2.0, 3.0])
    model[2].requires_grad_(False)
    la.fit(d)
    model[2].requires_grad_(True)
    assert_same(la.fit(d), model, d, [1.0, 7.0, 3.0])


@pytest.mark.parametrize("sharing", ["scalar", "layerwise"])
def test_a_loaded_posterior_fits_again(sharing, tmp_path):
    la, model, d = fitted(freeze=[0], prior_structure=sharing)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", model)
    model[0].requires_grad_(True)
    assert set(loaded.fit(d).prior_precision.tolist()) == {START}


def test_layers_of_another_width_start_as_given_but_for_parameters_of_one_shape():
    """Here the bias of the second layer is what it was, and hands its precision to the layer."""
    la, model, d = fitted(prior_precision=1.5)
    la.prior_precision = torch.tensor([1.0, 2.0, 3.0])
    model[0] = torch.nn.Linear(3, 5).double()
    model[2] = torch.nn.Linear(5, 3).double()
    assert_same(la.fit(d), model, d, [1.5, 2.0, 3.0])


class Gated(torch.nn.Module):
    """A layer beside the network, which has no effect until it is switched on."""

    def __init__(self):
        super().__init__()
        self.beside, self.network = torch.nn.Linear(4, 3).double(), build("mlp-tanh").model
        self.on = False

    def forward(self, x):
        return self.network(x) + self.beside(x) if self.on else self.network(x)


def test_entries_of_a_subnetwork_go_on_by_name():
    """A weight and its bias join: the bias comes first in their block, and none is mixed up."""
    d, model = build("mlp-tanh").batches, Gated()
    subset = torch.tensor([9, 10, 12, 20])  # row 2 of a weight (3, 4), the bias of row 0, another
    la = Laplace(model, hessian_structure="diag", subset_of_weights=subset, prior_structure="unit")
    la.fit(d)
    la.prior_precision = torch.tensor([1.0, 2.0, 3.0])
    before = la.prior_precision_diag
    assert before.tolist() == [1.0, 1.0, 2.0, 3.0]
    model.on = True
    la.fit(d)
    assert la.curvature.groups[0].layout.params == ("beside.weight", "beside.bias")
    assert torch.equal(la.prior_precision_diag, before)
