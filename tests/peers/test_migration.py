"""Calls as laplace-torch's users write them, run on both libraries: the same choice."""

import pytest
import torch
from peers import peer

from kfac_laplace import Laplace


def both(likelihood="classification"):
    model, (x, y) = peer.mlp(), peer.data(likelihood, 5)
    theirs = peer.fit(model, likelihood, peer.loader(x, y))
    ours = Laplace(model, likelihood, joint_bias=False).fit(peer.loader(x, y))
    held_out = peer.data(likelihood, 5, n=40)
    return theirs, ours, peer.loader(*held_out)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"log_prior_prec_min": -2, "grid_size": 9}])
@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_the_grid_search_of_their_readme(link, more):
    """The best of their candidates by their predictions, looked at one by one.

    Their own search averages over all candidates so far: its metric is never reset.
    """
    theirs, ours, val_loader = both()
    ours.optimize_prior_precision(
        method=peer.laplace.TuningMethod.GRIDSEARCH,
        pred_type=peer.laplace.PredType.GLM,
        link_approx=peer.laplace.LinkApprox(link),
        val_loader=val_loader,
        **more,
    )
    x, y = val_loader.dataset.tensors
    losses = {}
    ends = more.get("log_prior_prec_min", -4), 4, more.get("grid_size", 100)
    for delta in torch.logspace(*ends, dtype=torch.float64):
        theirs.prior_precision = delta
        probs = theirs(x, pred_type="glm", link_approx=link)
        losses[delta] = float(torch.nn.functional.nll_loss(probs.log(), y))
    expected = min(losses, key=losses.get).expand_as(ours.prior_precision)
    torch.testing.assert_close(ours.prior_precision, expected)


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_their_search_ends_where_ours_does(structure):
    """After enough steps of theirs: the same evidence, at the same precisions."""
    theirs, ours, _ = both()
    for la in (theirs, ours):
        la.optimize_prior_precision(
            "glm",
            "marglik",
            n_steps=800,
            init_prior_prec=0.5,
            prior_structure=peer.laplace.PriorStructure(structure),
        )
    torch.testing.assert_close(
        ours.log_marginal_likelihood(),
        theirs.log_marginal_likelihood().squeeze(),
        rtol=0,
        atol=1e-3,
    )
    assert ours.prior_precision.shape == theirs.prior_precision.shape


def test_their_words_for_the_gaussian():
    """On Jacobians and parameters of theirs, with one precision for each tensor."""
    theirs, ours, loader = both()
    delta = torch.linspace(0.5, 4, 4, dtype=torch.float64)
    theirs.prior_precision = ours.prior_precision = delta
    x = loader.dataset.tensors[0][:5]
    jacobians, _ = theirs.backend.jacobians(x)
    value = theirs.mean + 0.1
    for ask in (
        lambda la: la.functional_variance(jacobians),
        lambda la: la.functional_covariance(jacobians),
        lambda la: la.log_prob(value),
        lambda la: la.log_prob(value, normalized=False),
        lambda la: la.square_norm(value),
        lambda la: la.prior_precision_diag,
        lambda la: la.mean,
        lambda la: torch.tensor([la.n_params, la.n_outputs, la.n_data]),
    ):
        torch.testing.assert_close(ask(ours), ask(theirs))
