"""Subnetworks as laplace-torch's users choose and use them: the same entries, the same numbers."""

import pytest
import torch
from laplace.utils import subnetmask as theirs
from peers import peer

from kfac_laplace import Laplace
from kfac_laplace import subnetworks as ours


def posteriors(indices, structure, likelihood):
    model, (x, y) = peer.mlp(), peer.data(likelihood, 5)
    words = {
        "hessian_structure": structure,
        "subset_of_weights": "subnetwork",
        "subnetwork_indices": indices,
        "prior_precision": 0.7,
    }
    noise = {"sigma_noise": 0.6} if likelihood == "regression" else {}
    them = peer.laplace.Laplace(model, likelihood, **words, **noise)
    them.fit(peer.loader(x, y))
    us = Laplace(model, likelihood, prior_structure="scalar", **words, **noise)
    return them, us.fit(peer.loader(x, y)), x, model


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("structure", ["diag", "full"])
def test_evidence_predictions_and_draws(structure, likelihood):
    indices = torch.tensor([0, 3, 4, 17, 30, 33, 40, 55])
    them, us, x, model = posteriors(indices, structure, likelihood)
    # Their diagonal goes through a product of roots: agreement to rounding all the same.
    torch.testing.assert_close(us.log_marginal_likelihood(), them.log_marginal_likelihood())
    for mine, other in zip(us(x, link_approx="probit"), them(x), strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(us.mean, them.mean.double())
    assert us.n_params == them.n_params and us.n_params_subnet == them.n_params_subnet
    torch.testing.assert_close(us.posterior_precision, them.posterior_precision)
    torch.testing.assert_close(us.prior_precision_diag, them.prior_precision_diag.double())
    assert us.sample(5).shape == them.sample(5).shape


def test_masks_choose_the_same_entries():
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    loader = peer.loader(x, y)
    diagonal = peer.laplace.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="diag"
    )
    own = Laplace(model, "classification", hessian_structure="diag", prior_structure="scalar")
    pairs = [
        (theirs.LargestMagnitudeSubnetMask(model, 9), ours.LargestMagnitudeSubnetMask(model, 9)),
        (
            theirs.LargestVarianceDiagLaplaceSubnetMask(model, 9, diagonal),
            ours.LargestVarianceDiagLaplaceSubnetMask(model, 9, diag_laplace_model=own),
        ),
        (
            theirs.ParamNameSubnetMask(model, ["0.bias", "2.weight"]),
            ours.ParamNameSubnetMask(model, ["0.bias", "2.weight"]),
        ),
        (theirs.ModuleNameSubnetMask(model, ["0"]), ours.ModuleNameSubnetMask(model, ["0"])),
        (theirs.LastLayerSubnetMask(model), ours.LastLayerSubnetMask(model)),
        (theirs.LastLayerSubnetMask(model, "0"), ours.LastLayerSubnetMask(model, "0")),
    ]
    for other, mine in pairs:
        want = other.select(loader)
        assert torch.equal(mine.select(loader), want), type(mine).__name__
        assert torch.equal(mine.indices, want) and mine.n_params_subnet == len(want)
