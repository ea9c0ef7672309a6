"""Curvature that a peer gets wrong, each run against it: the peer fails, ours equals the oracle.

laplace-torch 0.3, curvlinops 3.0.1 and asdfghjkl 0.1a4, on models of a few dozen parameters.
"""

import oracles
import pytest
import torch
from cases import build
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
    """One example and one output position: K-FAC is exact, group by group."""
    model = peer.seeded(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=groups, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
    )
    x, y = peer.data("classification", 4, 3, 3, n=1)
    expected = oracles.ggn(model, x, y, "classification", ["0.weight"])
    ours = Laplace(model, "classification").fit([(x, y)])
    assert relative_error(dense(ours, "0.weight"), expected) < 1e-10

    theirs = peer.fit(model, "classification", peer.loader(x, y))
    size = model[0].weight.numel()
    assert relative_error(peer.hessian(theirs)[:size, :size], expected) > 0.5


def test_a_module_used_twice_is_one_parameter():
    """N = 1 with a bias alone under reduce is exact; the peer's trace is a multiple of it."""

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

    theirs = peer.hessian(peer.fit(model, "classification", peer.loader(x, y)))
    exact = oracles.ggn(model, *data, ["shared.weight"]).trace()
    assert theirs[:25, :25].trace() > 2.5 * exact
    assert 0.5 < weight.trace() / exact < 1.5


def test_tied_weights():
    """Two modules share one weight; the peer cannot even add up its factors."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.second(self.first(x).tanh()).tanh())

    model = peer.seeded(Tied)
    x, y = peer.data("classification", 4)
    ours = Laplace(model, "classification").fit(peer.loader(x, y))
    assert ours.coverage["first.weight"] == "kron"
    size = sum(p.numel() for p in model.parameters())
    assert ours.sample(1).shape == (1, size)
    exact = oracles.ggn(model, x, y, "classification", ["first.weight"]).trace()
    assert 0.5 < dense(ours, "first.weight").trace() / exact < 1.5
    with pytest.raises(RuntimeError):
        peer.fit(model, "classification", peer.loader(x, y)).log_marginal_likelihood()


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


def test_padding_modes_reach_the_input_factor():
    """curvlinops unfolds zeros whatever the mode."""
    curvlinops = pytest.importorskip("curvlinops")
    factors = {}
    for mode in ("zeros", "reflect"):
        model = peer.seeded(
            lambda mode=mode: nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 3),
            )
        )
        x, y = peer.data("classification", 2, 4, 4)
        ours = Curvature(model, "classification", kfac_approx="expand", joint_bias=False)
        ours.fit([(x, y)])
        expected = oracles.kfac_factors(
            model, "0", (x, y, "classification"), "expand", joint_bias=False
        )
        got = ours.blocks["0.weight"].factors.input
        assert relative_error(got, expected.input) < 1e-12
        factors[mode] = kfac_by_curvlinops(curvlinops, model, x, y)._input_covariances["0"]
    torch.testing.assert_close(factors["zeros"], factors["reflect"])


def kfac_by_curvlinops(curvlinops, model, x, y):
    """curvlinops' exact K-FAC-expand of one batch, summed over examples."""
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=True,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    return operator


def test_token_outputs_where_layers_mix_tokens():
    """Backpropagating one class for all tokens at once adds cross terms between tokens."""
    curvlinops = pytest.importorskip("curvlinops")
    net = build("tokens")

    class Flattened(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).flatten(0, 1)

    theirs = kfac_by_curvlinops(curvlinops, Flattened(net.model), net.x, net.y.flatten())
    ours = Curvature(net.model, "classification", kfac_approx="expand", joint_bias=False)
    ours.fit(net.batches)
    for layer, wrong in {"attention.v": 2.0, "attention.k": 1.2}.items():
        expected = oracles.kfac_factors(net.model, layer, net.data, "expand", joint_bias=False)
        got = ours.blocks[f"{layer}.weight"].factors.output
        assert relative_error(got, expected.output) < 1e-10
        peers_factor = theirs._gradient_covariances[f"model.{layer}"]
        assert peers_factor.norm() > wrong * expected.output.norm()


def test_linear_layers_divide_by_the_shared_positions():
    """ASDL's linear input factor lacks 1/R: its block is R times too large."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.first(x).tanh().mean(1))

    model = peer.seeded(Tokens)
    x, y = peer.data("classification", 6, 4)  # R = 6
    ours = Laplace(model, "classification", kfac_approx="expand", joint_bias=False)
    ours.fit(peer.loader(x, y))
    expected = torch.einsum("nti,ntj->ij", x, x) / (24 * 6)
    got = ours.curvature.blocks["first.weight"].factors.input[0]
    torch.testing.assert_close(got, expected)
    theirs = peer.fit(model, "classification", peer.loader(x, y), backend="asdl")
    torch.testing.assert_close(theirs.H_facs.kfacs[0][1], 6 * expected)


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
    """ASDL drops a LayerNorm registered last: a log-determinant ratio below zero."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head, self.norm = nn.Linear(5, 6), nn.Linear(6, 3), nn.LayerNorm(6)

        def forward(self, x):
            return self.head(self.norm(self.first(x)).tanh())

    model = peer.seeded(Normed)
    x, y = peer.data("classification", 5)
    theirs = peer.fit(model, "classification", peer.loader(x, y), backend="asdl")
    theirs.prior_precision = 10.0
    assert theirs.log_det_ratio < 0
    ours = Laplace(model, "classification", prior_precision=10.0).fit(peer.loader(x, y))
    assert ours.log_det_ratio > 0
    assert set(ours.coverage) == {name for name, _ in model.named_parameters()}
    exact = oracles.ggn(model, x, y, "classification", ["norm.weight", "norm.bias"]).diagonal()
    blocks = ours.curvature.blocks
    got = torch.cat([blocks[f"norm.{kind}"].dense().diagonal() for kind in ("weight", "bias")])
    torch.testing.assert_close(got, exact)
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
