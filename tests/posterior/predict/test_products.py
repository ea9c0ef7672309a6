"""J P⁻¹ Jᵀ from gradients in factors, in every order of products, against dense J and P."""

import pytest
import torch
from cases import case
from posterior import dense
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.curvature.linalg.spectrum import Spectrum
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.rows.per_example import LookedUp, Outer
from kfac_laplace.posterior.block import SpectralNormal
from kfac_laplace.posterior.predict import products

TOL = {"rtol": 1e-9, "atol": 1e-10}  # float64 solves of well-conditioned P
DELTA = 0.7
#: vectors, blocks, examples, positions, rows, columns
SHAPES = {
    "one row": (4, 1, 3, 1, 5, 4),
    "one example": (4, 1, 1, 3, 5, 4),
    "one output": (1, 1, 3, 2, 5, 4),
    "few positions": (6, 1, 3, 2, 5, 7),
    "many positions": (2, 1, 3, 23, 3, 4),
    "more positions than columns": (6, 1, 3, 11, 5, 4),
    "groups": (4, 3, 2, 5, 2, 4),
    "depthwise": (4, 5, 2, 6, 1, 3),
    "one column": (4, 1, 3, 5, 6, 1),
    "scalars": (2, 1, 3, 4, 1, 1),
}


def normal_of(spectrum):
    one = torch.ones((), dtype=torch.float64)
    return SpectralNormal(spectrum, 1.3 * one, DELTA * one)


def spectrum(b, o, i, kind):
    """Bases of random rotations and random eigenvalues, of which some are zero."""
    values = torch.rand(b, o, i, dtype=torch.float64)
    values[..., 0] = 0
    left, right = (
        torch.linalg.qr(torch.randn(b, d, d, dtype=torch.float64)).Q
        if d > 1
        else torch.ones(b, 1, 1, dtype=torch.float64)
        for d in (o, i)
    )
    bases = {"kron": (left, right), "diagonal right": (left, None), "diag": None}[kind]
    return Spectrum(values, None if bases is None else lambda: bases)


def expected(normal, gradients, width):
    """By a solve with the dense P of each block."""
    v, n, b, o, i = gradients.shape
    eye = torch.eye(o * i, dtype=torch.float64).reshape(o * i, o, i)
    total = torch.zeros(n, v, v, dtype=torch.float64)
    for block in range(b):
        spread = normal.spectrum.values[block].flatten().diag()
        if normal.spectrum.bases is not None:
            left, right = normal.spectrum.bases
            right = torch.eye(i, dtype=torch.float64) if right is None else right[block]
            rotation = torch.stack([left[block] @ e @ right.T for e in eye]).flatten(1)
            spread = rotation.T @ spread @ rotation
        precision = normal.scale * spread + DELTA * torch.eye(o * i, dtype=torch.float64)
        j = gradients[:, :, block].flatten(2).movedim(1, 0)  # (n, v, o i)
        total += j @ torch.linalg.solve(precision, j.mT)
    return torch.stack([total[:, s : s + width, s : s + width] for s in range(0, v, width)], 1)


def outer(v, b, n, t, o, i):
    left = torch.randn(v, b, n, t, o, dtype=torch.float64)
    return Outer(left, torch.randn(b, n, t, i, dtype=torch.float64))


@pytest.mark.parametrize("order", ["by_pairs", "by_matrices"])
@pytest.mark.parametrize("kind", ["kron", "diagonal right", "diag"])
@pytest.mark.parametrize("name", SHAPES)
def test_either_order_is_the_plain_formula(name, kind, order):
    v, b, n, t, o, i = SHAPES[name]
    torch.manual_seed(0)
    normal, gradients = normal_of(spectrum(b, o, i, kind)), outer(v, b, n, t, o, i)
    for width in {v, 1, max(1, v // 2)}:
        found = getattr(products, order)(normal, gradients, width, Budget())
        torch.testing.assert_close(found, expected(normal, gradients.dense(), width), **TOL)


@pytest.mark.parametrize("name", SHAPES)
def test_the_order_chosen_is_the_plain_formula(name):
    v, b, n, t, o, i = SHAPES[name]
    torch.manual_seed(1)
    normal, gradients = normal_of(spectrum(b, o, i, "kron")), outer(v, b, n, t, o, i)
    found = products.factored_covariance(normal, gradients, v, Budget())
    torch.testing.assert_close(found, expected(normal, gradients.dense(), v), **TOL)


@pytest.mark.parametrize("order", ["by_pairs", "by_matrices"])
def test_pieces_under_the_budget_add_up(order):
    """A budget below one matrix: one example and one of its rows at a time."""
    torch.manual_seed(2)
    normal, gradients = normal_of(spectrum(2, 5, 4, "kron")), outer(6, 2, 3, 9, 5, 4)
    found = getattr(products, order)(normal, gradients, 3, Budget(1))
    torch.testing.assert_close(found, expected(normal, gradients.dense(), 3), **TOL)


@pytest.mark.parametrize("kind", ["diagonal right", "diag", "kron"])
def test_lookups_are_the_plain_formula(kind):
    """Several rows look up one entry, and some entries are looked up by none."""
    torch.manual_seed(3)
    normal = normal_of(spectrum(1, 3, 7, kind))
    index = torch.tensor([[0, 2, 2, 5], [6, 6, 6, 6], [1, 3, 1, 0]])
    table = LookedUp(torch.randn(4, 1, 3, 4, 3, dtype=torch.float64), index, 7)
    found = products.factored_covariance(normal, table, 2, Budget())
    torch.testing.assert_close(found, expected(normal, table.dense(), 2), **TOL)


def pixels():
    """A label for each pixel: outputs (n, c, h, w)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1))
        return case(net, (1, 3, 4), "classification")


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("budget", [None, 1])
def test_pixels_have_the_covariance_of_each_row(structure, budget):
    """Also where the budget admits one input and one output row at a time."""
    net = pixels()
    x, y = net.x, torch.randint(2, (7, 3, 4), generator=torch.Generator().manual_seed(0))
    options = {"hessian_structure": structure, "memory_budget": budget}
    la = Laplace(net.model, "classification", **options).fit([(x, y)])
    weights = dict(net.model.named_parameters())
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(net.model, p, (x,)))(
        {name: weights[name].detach() for name in dense.covered(la, net.model)}
    )
    j = torch.cat([part.flatten(4) for part in jacobians.values()], -1)  # (n, c, h, w, p)
    j = j.flatten(2, 3).movedim(2, 1)  # (n, t, c, p)
    inverse = torch.linalg.inv(dense.precision(la, net.model))
    found = la.predict(x)
    torch.testing.assert_close(found.covariance, j @ inverse @ j.mT, **TOL)
    torch.testing.assert_close(found.mean_f, net.model(x).detach().flatten(2).mT, **TOL)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "vit", "tokens"])
def test_a_small_budget_changes_no_prediction(name):
    la, net = dense.fit(name)
    whole = la.predict(net.x)
    pieces = dense.fit(name, memory_budget=1)[0].predict(net.x)
    torch.testing.assert_close(pieces.covariance, whole.covariance, **TOL)
    torch.testing.assert_close(pieces.mean_f, whole.mean_f, **TOL)
