"""Autograd functions written in Python, and parts of a forward pass without gradients.

Inside both gradients are off while the calls are still seen: none of them is a use of a parameter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functional import Functional, parameter
from laws import assert_complete, assert_dense_structures_are_exact, fitted, seeded_case
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kfac_laplace import Laplace

INPUTS, OUTPUTS = 3, 4


class Textbook(Function):
    """x Wᵀ, as tutorials write it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(x)


class Affine(Function):
    """x Wᵀ + b with two parameters, the second expanded over the examples."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x.mm(weight.t()) + bias.unsqueeze(0).expand(len(x), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad.mm(weight), grad.t().mm(x), grad.sum(0)


class SetUp(Function):
    """The newer form, with a context that is set up apart, by `weight.T @`."""

    @staticmethod
    def forward(x, weight):
        return (weight.T.mT @ x.T).T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class InPlace(Function):
    """Writes into what it is given."""

    @staticmethod
    def forward(ctx, z, scale):
        ctx.save_for_backward(z.clone(), scale)
        ctx.mark_dirty(z)
        return z.mul_(scale.view(1, -1))

    @staticmethod
    def backward(ctx, grad):
        z, scale = ctx.saved_tensors
        return grad * scale, (grad * z).sum(0)


class Layered(Function):
    """Rules inside: a linear map, a lookup of rows, and an expanded row."""

    @staticmethod
    def forward(ctx, x, weight, row):
        ctx.save_for_backward(x, weight)
        return (
            F.linear(x, weight) + row.expand(len(x), -1) + weight[:, 0] - weight.narrow(1, 0, 1).T
        )

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0)


class OfWeightAlone(Function):
    """Rows of norm one, with the derivative of the quotient."""

    @staticmethod
    def forward(ctx, weight):
        unit = weight / weight.norm(dim=1, keepdim=True)
        ctx.save_for_backward(unit, weight.norm(dim=1, keepdim=True))
        return unit.t().t()

    @staticmethod
    def backward(ctx, grad):
        unit, norm = ctx.saved_tensors
        return (grad - unit * (grad * unit).sum(1, keepdim=True)) / norm


class Doubled(Function):
    """Writes into a function of a weight."""

    @staticmethod
    def forward(ctx, weight):
        ctx.mark_dirty(weight)
        return weight.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def by_hand(m: Functional, x: Tensor) -> Tensor:
    """A spectral norm by power iteration: the vectors are constants, the norm is not."""
    with torch.no_grad():
        u = F.normalize(m.w.t() @ m.w[:, :1].sum(1) + 1, dim=0)
        for _ in range(3):
            v = F.normalize(m.w @ u, dim=0)
            u = F.normalize(m.w.t() @ v, dim=0)
    return F.linear(x, m.w / (v @ m.w @ u))


def scaled_by_a_constant(m: Functional, x: Tensor) -> Tensor:
    with torch.no_grad():
        norm = m.w.t().norm() + F.linear(x, m.w).abs().mean() * 0
    return F.linear(x, m.w / norm)


def detached(m: Functional, x: Tensor) -> Tensor:
    return F.linear(x, m.w / m.w.detach().t().norm()) + x @ m.w.detach().T


def in_inference_mode(m: Functional, x: Tensor) -> Tensor:
    with torch.inference_mode():
        norm = float(m.w.t().norm())
    return F.linear(x, m.w) / norm


def nested(m: Functional, x: Tensor) -> Tensor:
    """Gradients back on inside."""
    with torch.no_grad():
        turned = m.w.t()
        with torch.enable_grad():
            y = x @ m.w.t()
        norm = turned.norm()
    return y / norm


MODELS = {
    "textbook": (lambda m, x: Textbook.apply(x, m.w), {"w": (OUTPUTS, INPUTS)}),
    "affine": (lambda m, x: Affine.apply(x, m.w, m.b), {"w": (OUTPUTS, INPUTS), "b": (OUTPUTS,)}),
    "set up": (lambda m, x: SetUp.apply(x, m.w), {"w": (OUTPUTS, INPUTS)}),
    "in place": (
        lambda m, x: InPlace.apply(F.linear(x, m.w), m.b),
        {"w": (OUTPUTS, INPUTS), "b": (OUTPUTS,)},
    ),
    "layered": (lambda m, x: Layered.apply(x, m.w, m.b), {"w": (OUTPUTS, INPUTS), "b": (OUTPUTS,)}),
    "twice": (
        lambda m, x: Textbook.apply(Textbook.apply(x, m.w).tanh(), m.w.t()),
        {"w": (OUTPUTS, INPUTS)},
    ),
    "beside a rule": (
        lambda m, x: Textbook.apply(x, m.w) + F.linear(x, m.w),
        {"w": (OUTPUTS, INPUTS)},
    ),
    "of a source": (lambda m, x: Textbook.apply(x, m.w.tanh()), {"w": (OUTPUTS, INPUTS)}),
    "of a part": (lambda m, x: Textbook.apply(x, m.w[:OUTPUTS]), {"w": (2 * OUTPUTS, INPUTS)}),
    "weight alone": (lambda m, x: F.linear(x, OfWeightAlone.apply(m.w)), {"w": (OUTPUTS, INPUTS)}),
    "source in place": (
        lambda m, x: F.linear(x, Doubled.apply(m.w * 1.5)),
        {"w": (OUTPUTS, INPUTS)},
    ),
    "spectral norm by hand": (by_hand, {"w": (OUTPUTS, INPUTS)}),
    "scaled by a constant": (scaled_by_a_constant, {"w": (OUTPUTS, INPUTS)}),
    "detached": (detached, {"w": (OUTPUTS, INPUTS)}),
    "in inference mode": (in_inference_mode, {"w": (OUTPUTS, INPUTS)}),
    "nested": (nested, {"w": (OUTPUTS, INPUTS)}),
}
#: The function is the only use: there is no layer to see.
GENERIC = {"textbook", "affine", "set up", "of a source", "of a part", "weight alone"}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_custom_functions_have_the_exact_blocks_of_their_derivatives(name):
    function, members = MODELS[name]
    width = INPUTS if name == "twice" else OUTPUTS

    def make() -> Functional:
        shapes = {key: parameter(*shape) for key, shape in members.items()}
        return Functional(function, width, **shapes)

    example = seeded_case(make)
    assert_dense_structures_are_exact(example)
    curvature = fitted(example)
    assert_complete(curvature, example.model)
    if name in GENERIC:
        assert {curvature.coverage[key] for key in members} == {"diag"}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("size", [1, 5])
def test_the_textbook_layer_goes_through_everything(structure, size):
    """Batches of any size, evidence, predictions by closed form and by weight samples."""
    example = seeded_case(
        lambda: Functional(MODELS["textbook"][0], OUTPUTS, w=parameter(OUTPUTS, INPUTS))
    )
    x, y = example.data[:2]
    batches = list(zip(x.split(size), y.split(size), strict=True))
    la = Laplace(example.model, hessian_structure=structure).fit(batches)
    whole = Laplace(example.model, hessian_structure=structure).fit([(x, y)])
    torch.testing.assert_close(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
    torch.testing.assert_close(la(x), whole(x))
    assert bool(torch.isfinite(la(x, pred_type="nn", n_samples=3)).all())
