"""Curvature that a peer gets wrong, each run against it: the peer fails, ours equals the oracle.

laplace-torch 0.3, curvlinops 3.0.1 and asdfghjkl 0.1a4, on models of a few dozen parameters.
"""

import warnings

import oracles
import pytest
import torch
from peers import peer
from torch import nn

from kfac_laplace import Curvature, Laplace, MonteCarlo


def dense(la_or_curvature, name):
    curvature = getattr(la_or_curvature, "curvature", la_or_curvature)
    return curvature.blocks[name].dense()


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_are_not_averaged_over_groups(groups):
    """One example and one output position: K-FAC is exact within each group."""
    model = peer.seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=groups, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )
    x, y = peer.data("classification", 4, 3, 3, n=1)
    exact = oracles.ggn(model, x, y, "classification", ["0.weight"])
    of_group = torch.arange(groups).repeat_interleave(len(exact) // groups)
    expected = exact * (of_group[:, None] == of_group)  # blocks of different groups do not meet
    ours = Laplace(model, "classification").fit([(x, y)])
    assert relative_error(dense(ours, "0.weight"), expected) < 1e-10

    theirs = peer.fit(model, "classification", peer.loader(x, y))
    size = model[0].weight.numel()
    assert relative_error(peer.hessian(theirs)[:size, :size], expected) > 0.5


def test_a_module_used_twice_is_one_parameter():
    """The bias alone is exact under reduce; the peer's trace is a multiple of the exact one."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.shared(self.shared(x).tanh()).tanh())

    model = peer.seeded(Twice)
    x, y = peer.data("classification", 5)
    data = (x, y, "classification")
    ours = Laplace(model, "classification", joint_bias=False).fit(peer.loader(x, y))
    expected = oracles.ggn(model, *data, ["shared.bias"])
    assert relative_error(dense(ours, "shared.bias"), expected) < 1e-10
    factors = oracles.kfac_factors(model, "shared", data, "reduce", joint_bias=False)
    weight = dense(ours, "shared.weight")
    assert relative_error(weight, oracles.kfac_block(factors)) < 1e-10

    theirs = peer.hessian(peer.fit(model, "classification", peer.loader(x, y)))[:25, :25]
    exact = oracles.ggn(model, *data, ["shared.weight"]).trace()
    assert theirs.trace() > 2.5 * exact
    assert abs(weight.trace() - exact) < 0.5 * abs(theirs.trace() - exact)


class Chain(nn.Module):
    """Linear, tanh, linear with the same weight, tanh, head: one module twice, or two tied ones."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        if tied:
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

    def forward(self, x):
        second = self.second if hasattr(self, "second") else self.first
        return self.head(second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_tied_weights(setting):
    """Two modules that share a weight are one module used twice; the peer misses a use."""
    reused, tied = peer.seeded(lambda: Chain(tied=False)), peer.seeded(lambda: Chain(tied=True))
    tied.load_state_dict(reused.state_dict(), strict=False)
    x, y = peer.data("classification", 4)
    ours = Laplace(tied, "classification", kfac_approx=setting).fit(peer.loader(x, y))
    factors = oracles.kfac_factors(reused, "first", (x, y, "classification"), setting)
    assert relative_error(dense(ours, "first.weight"), oracles.kfac_block(factors)) < 1e-10
    assert ours.sample(1).shape == (1, sum(p.numel() for p in tied.parameters()))
    theirs = peer.fit(tied, "classification", peer.loader(x, y))
    one_use = torch.einsum("ni,nj->ij", x, x) / 24
    torch.testing.assert_close(theirs.H_facs.kfacs[0][1], one_use)


def test_frozen_biases_beside_square_layers():
    """Frozen means frozen; the peer matches factors with parameters by list position."""
    model = peer.seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    model[0].bias.requires_grad_(False)
    x, y = peer.data("classification", 4, outputs=4)
    ours = Laplace(model, "classification").fit(peer.loader(x, y))
    assert ours.coverage["0.bias"] == "frozen"
    factors = oracles.kfac_factors(model, "0", (x, y, "classification"), "expand")
    assert relative_error(dense(ours, "0.weight"), oracles.kfac_block(factors)) < 1e-10
    assert ours(x).shape == (24, 4)
    theirs = peer.fit(model, "classification", peer.loader(x, y))
    with pytest.raises(RuntimeError):
        theirs(x)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_empirical_fisher_for_regression(structure):
    """The peer squares the gradient of the whole square and halves once: a factor 2."""
    model = peer.mlp(outputs=2)
    x, y = peer.data("regression", 5, outputs=2)
    expected = oracles.empirical_fisher(model, x, y, "regression")
    ours = Laplace(model, "regression", hessian_structure=structure, fisher="empirical")
    ours.fit(peer.loader(x, y))
    got = torch.cat([b.dense().diagonal() for b in ours.curvature.blocks.values()])
    torch.testing.assert_close(got, expected.diagonal(), rtol=1e-10, atol=1e-12)

    theirs = peer.laplace.Laplace(
        model,
        "regression",
        subset_of_weights="all",
        hessian_structure=structure,
        backend=peer.curvature.CurvlinopsEF,
    )
    theirs.fit(peer.loader(x, y))
    torch.testing.assert_close(peer.hessian(theirs).diagonal(), 2 * expected.diagonal())


def test_monte_carlo_labels_differ_from_batch_to_batch():
    """The peer seeds anew for every batch: two equal batches get equal labels."""
    model = peer.mlp()
    x, y = peer.data("classification", 5)
    theirs = peer.curvature.CurvlinopsGGN(model, "classification", stochastic=True)
    first, second = (theirs.kron(x, y, N=48)[1].kfacs[0][0] for _ in range(2))
    assert torch.equal(first, second)

    ours = Curvature(model, "classification", fisher=MonteCarlo(samples=1))
    ours.accumulate(x, y)
    once = dense(ours, "0.weight").clone()
    ours.accumulate(x, y)
    assert relative_error(dense(ours, "0.weight"), 2 * once) > 1e-3


def test_a_norm_layer_is_never_dropped():
    """ASDL says "Skip" and goes on without it: a log-determinant ratio below zero."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.norm = nn.Linear(5, 6), nn.Linear(6, 3), nn.LayerNorm(6)

        def forward(self, x):
            return self.head(self.norm(self.first(x)).tanh())

    model = peer.seeded(Normed)
    x, y = peer.data("classification", 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peer.fit(model, "classification", peer.loader(x, y), backend="asdl")
    assert any("LayerNorm" in str(w.message) and "Skip" in str(w.message) for w in caught)
    theirs.prior_precision = 10.0
    assert theirs.log_det_ratio < 0
    ours = Laplace(model, "classification", prior_precision=10.0).fit(peer.loader(x, y))
    assert ours.log_det_ratio > 0
    assert set(ours.coverage) == {name for name, _ in model.named_parameters()}
    exact = oracles.ggn(model, x, y, "classification", ["norm.weight", "norm.bias"])
    torch.testing.assert_close(ours.curvature.blocks["norm.weight"].dense(), exact)
    with pytest.raises(NotImplementedError):
        peer.fit(model, "classification", peer.loader(x, y), backend="curvlinops")


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh])
def test_in_place_activations_change_nothing(activation):
    """Hook-based peers (BackPACK, older ASDL) trip over them; the two run here do not."""
    x, y = peer.data("classification", 5)
    evidences = []
    for inplace in (False, True):
        model = peer.seeded(
            lambda inplace=inplace: nn.Sequential(
                nn.Linear(5, 6), activation(inplace=inplace), nn.Linear(6, 3)
            )
        )
        ours = Laplace(model, "classification").fit(peer.loader(x, y))
        evidences.append(ours.log_marginal_likelihood().detach())
        assert ours(x).shape == (24, 3)
    assert torch.equal(*evidences)
