"""laplace-torch on this library's curvature gives this library's posterior: evidence, predictive.

Models of a few dozen parameters, float64, batches of unequal size, one precision for each tensor.
"""

import pytest
import torch
from peers import peer
from torch import nn
from torch.utils.data import DataLoader

from kfac_laplace import Laplace, MonteCarlo
from kfac_laplace.integrations.laplace_torch import KfacEF, KfacGGN, KfacMC

# laplace-torch takes its Jacobians by torch.func, which has no rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

TOL = {"rtol": 1e-6, "atol": 1e-8}


class ViT(nn.Module):
    """Patches, class token, positions, one block of attention and MLP; with or without norms."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.embed = nn.Conv2d(2, 4, 3, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 5, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        n = self.norm(x)
        x = x + self.attention(n, n, n, need_weights=False)[0]
        return self.head((x + self.mlp(x)).mean(1))


class Words(nn.Module):
    """An embedding, a layer over its tokens, and their mean."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(self.embed(x)).tanh().mean(1))


def images(outputs=3):
    return peer.data("classification", 2, 6, 6, outputs=outputs)


def words():
    return torch.arange(24 * 5).reshape(24, 5) % 7, images()[1]


CASES = {
    "mlp": (peer.mlp, "classification", lambda: peer.data("classification", 5)),
    "mlp-regression": (peer.mlp, "regression", lambda: peer.data("regression", 5)),
    "cnn": (peer.cnn, "classification", images),
    "vit": (lambda: peer.seeded(ViT), "classification", images),
    "vit-norms": (lambda: peer.seeded(lambda: ViT(norm=True)), "classification", images),
    "embedding": (lambda: peer.seeded(Words), "classification", words),
}


def theirs(model, likelihood, loader, backend=KfacGGN, structure="kron", subset="all", **options):
    la = peer.laplace.Laplace(
        model,
        likelihood,
        hessian_structure=structure,
        subset_of_weights=subset,
        backend=backend,
        backend_kwargs=options,
    )
    la.fit(loader)
    return la


def same(la, ours, x, likelihood):
    """Evidence and GLM predictive, at one precision for each tensor and another noise."""
    delta = torch.linspace(0.5, 4, len(ours.curvature.blocks), dtype=torch.float64)
    if hasattr(la.model, "last_layer") and la.n_params != len(delta):
        delta = torch.full((1,), 1.7, dtype=torch.float64)  # all that it takes for a last layer
    sigma = [torch.tensor(0.7, dtype=torch.float64)] if likelihood == "regression" else []
    expected = ours.log_marginal_likelihood(delta, *sigma)
    torch.testing.assert_close(la.log_marginal_likelihood(delta, *sigma).squeeze(), expected, **TOL)
    mean, covariance = la._glm_predictive_distribution(x[:5])
    predictive = ours.predict(x[:5], link_approx="probit")
    torch.testing.assert_close(covariance, predictive.covariance, **TOL)
    if likelihood == "regression":
        torch.testing.assert_close(mean, predictive.mean, **TOL)
    else:
        torch.testing.assert_close(la(x[:5], link_approx="probit"), predictive.probs, **TOL)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
@pytest.mark.parametrize("name", CASES)
def test_the_posterior_is_ours(name, structure, approx):
    make, likelihood, data = CASES[name]
    model, (x, y) = make(), data()
    la = theirs(model, likelihood, peer.loader(x, y), structure=structure, kfac_approx=approx)
    ours = Laplace(
        model,
        likelihood,
        hessian_structure=structure,
        kfac_approx=approx,
        joint_bias=False,
    ).fit(peer.loader(x, y))
    same(la, ours, x, likelihood)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["mlp", "mlp-regression", "vit"])
def test_the_last_layer(name, structure):
    make, likelihood, data = CASES[name]
    model, (x, y) = make(), data()
    loader = peer.loader(x, y)
    la = theirs(model, likelihood, loader, structure=structure, subset="last_layer")
    ours = Laplace(
        model,
        likelihood,
        hessian_structure=structure,
        subset_of_weights="last_layer",
        joint_bias=False,
    ).fit(loader)
    same(la, ours, x, likelihood)


FISHERS = {
    "empirical": (KfacEF, {}, "empirical"),
    "drawn": (KfacMC, {"num_samples": 3}, MonteCarlo(3)),
    "drawn, in their words": (KfacGGN, {"stochastic": True, "num_samples": 3}, MonteCarlo(3)),
    "hybrid": (KfacGGN, {"fisher": "hybrid"}, "hybrid"),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_other_curvatures(fisher, structure):
    """The empirical one for regression too, where laplace-torch's own is twice as large."""
    backend, options, ours = FISHERS[fisher]
    make, likelihood, data = CASES["mlp-regression"]
    model, (x, y) = make(), data()
    la = theirs(model, likelihood, peer.loader(x, y), backend, structure, **options)
    la.prior_precision = torch.tensor(1.7, dtype=torch.float64)
    own = Laplace(
        model, likelihood, hessian_structure=structure, fisher=ours, joint_bias=False
    ).fit(peer.loader(x, y))
    expected = own.log_marginal_likelihood(1.7)
    torch.testing.assert_close(la.log_marginal_likelihood().squeeze(), expected, **TOL)


@pytest.mark.parametrize("name", ["mlp", "cnn", "embedding", "vit"])
def test_data_that_are_added(name):
    """`override=False` weighs second factors, whichever of the two they are."""
    make, likelihood, data = CASES[name]
    model, (x, y) = make(), data()
    la = theirs(model, likelihood, peer.loader(x[:10], y[:10]), kfac_approx="expand")
    la.fit(peer.loader(x[10:], y[10:]), override=False)
    ours = Laplace(model, likelihood, kfac_approx="expand", joint_bias=False)
    same(la, ours.fit(peer.loader(x, y)), x, likelihood)


def test_frozen_parameters():
    make, likelihood, data = CASES["vit-norms"]
    model, (x, y) = make(), data()
    model.norm.requires_grad_(False)
    model.attention.out_proj.bias.requires_grad_(False)
    la = theirs(model, likelihood, peer.loader(x, y), kfac_approx="reduce")
    ours = Laplace(model, joint_bias=False, kfac_approx="reduce").fit(peer.loader(x, y))
    same(la, ours, x, likelihood)


class Spare(nn.Module):
    """A layer, and parameters that no output depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(5, 3), nn.Linear(3, 3)
        self.table = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return self.used(x)


def test_parameters_without_effect(caplog):
    """They stay at their prior, and are named once, not in every batch."""
    model, (x, y) = peer.seeded(Spare), peer.data("classification", 5)
    la = theirs(model, "classification", peer.loader(x, y))
    assert [record.getMessage()[:9] for record in caplog.records] == ["no effect"]
    ours = Laplace(model, joint_bias=False).fit(peer.loader(x, y))
    same(la, ours, x, "classification")


class OfMapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = peer.mlp()

    def forward(self, data):
        return self.inner(data["x"])


def test_batches_that_are_mappings():
    """They reach the model whole, as laplace-torch's users have it."""
    model, (x, y) = peer.seeded(OfMapping), peer.data("classification", 5)
    loader = DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=7)
    la = theirs(model, "classification", loader)
    plain = theirs(model.inner, "classification", peer.loader(x, y))
    torch.testing.assert_close(la.log_marginal_likelihood(), plain.log_marginal_likelihood())


def test_a_subnetwork():
    """The entries of the whole diagonal, and of the whole matrix."""
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    indices = torch.tensor([1, 4, 30, 40])
    for structure in ("diag", "full"):
        whole = peer.hessian(
            theirs(model, "classification", peer.loader(x, y), structure=structure)
        )
        la = peer.laplace.Laplace(
            model,
            "classification",
            hessian_structure=structure,
            subset_of_weights="subnetwork",
            subnetwork_indices=indices,
            backend=KfacGGN,
        )
        la.fit(peer.loader(x, y))
        expected = whole[indices][:, indices]
        found = la.H if structure == "full" else la.H.diag()
        torch.testing.assert_close(found, expected, **TOL)


@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_marginal_likelihood_training(structure):
    """Its loop runs on the backend, and ends with the evidence that ours has at its end."""
    model, (x, y) = peer.mlp(), peer.data("classification", 5)
    la, model, margliks, _ = peer.laplace.marglik_training(
        model,
        peer.loader(x, y, shuffle=False),
        "classification",
        structure,
        backend=KfacGGN,
        n_epochs=3,
        n_hypersteps=2,
    )
    assert len(margliks) == 6
    ours = Laplace(model, hessian_structure=structure, joint_bias=False).fit(peer.loader(x, y))
    expected = ours.log_marginal_likelihood(la.prior_precision)
    torch.testing.assert_close(la.log_marginal_likelihood(), expected, **TOL)
