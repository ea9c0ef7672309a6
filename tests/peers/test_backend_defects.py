"""Factors that curvlinops 3.0.1 or asdfghjkl 0.1a4 get wrong, each run against it."""

import oracles
import pytest
import torch
from cases import TokenMixer
from peers import peer
from torch import nn

from kfac_laplace import Curvature, Laplace


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())


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
    model = peer.seeded(lambda: TokenMixer(4, 3))
    x, _ = peer.data("classification", 5, 4)
    x, y = 2 * x, peer.data("classification", n=24 * 5)[1].reshape(24, 5)
    data = (x, y, "classification")

    class Flattened(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).flatten(0, 1)

    theirs = kfac_by_curvlinops(curvlinops, Flattened(model), x, y.flatten())
    ours = Curvature(model, "classification", kfac_approx="expand", joint_bias=False)
    ours.fit(peer.loader(x, y))
    for layer, wrong in {"attention.v": 2.0, "attention.k": 1.2}.items():
        expected = oracles.kfac_factors(model, layer, data, "expand", joint_bias=False)
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
