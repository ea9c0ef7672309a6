"""A weight in another shape, order, precision or place keeps its block, or has an exact one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from functional import Functional, assert_block_of_twin, linear_twin, parameter, places_of
from laws import (
    assert_dense_structures_are_exact,
    assert_diagonal_blocks,
    assert_exact_blocks,
    assert_kfac_block,
    fitted,
    seeded_case,
)
from torch import nn

T, WIDTH, E = 5, 3, 4
settings = pytest.mark.parametrize("setting", ["expand", "reduce"])

#: One weight as a matrix (o, i) in another shape, order or precision.
FORMS = {
    "transposed": ((WIDTH, E), lambda w: w.T),
    "moved": ((2, 3, E), lambda w: w.permute(2, 0, 1).flatten(1)),
    "flattened": ((E, WIDTH, 1, 1), lambda w: w.flatten(1)),
    "dtype": ((E, WIDTH), lambda w: w.to(torch.float64)),
    "double": ((E, WIDTH), lambda w: w.double()),
    "contiguous": ((WIDTH, E), lambda w: w.T.contiguous()),
    "cloned": ((E, WIDTH), lambda w: w.clone()),
    "chained": ((1, WIDTH, E), lambda w: w[0].mT.double().contiguous()),
}


@settings
@pytest.mark.parametrize("how", FORMS)
def test_a_rearranged_weight_keeps_its_kronecker_factors(how, setting):
    shape, form = FORMS[how]
    width = form(torch.zeros(shape)).shape[1]
    members = {"w": parameter(*shape)}
    example = seeded_case(
        lambda: Functional(lambda model, x: F.linear(x, form(model.w)), E, **members), (T, width)
    )
    twin = linear_twin(example, lambda layers, x: layers[0](x), [form(example.model.w)])
    curvature = fitted(example, kfac_approx=setting)
    assert curvature.coverage["w"] == "kron"
    places = places_of(lambda w: [form(w)], torch.Size(shape))
    assert_block_of_twin(twin, curvature, "w", setting, places)
    assert_dense_structures_are_exact(example)


@settings
def test_a_linear_weight_as_a_convolution_kernel(setting):
    def function(model, x):
        kernel = model.w.view(E, WIDTH, 1, 1)
        return F.conv2d(x.mT[..., None], kernel, model.b)[..., 0].mT

    members = {"w": parameter(E, WIDTH), "b": parameter(E)}
    example = seeded_case(lambda: Functional(function, E, **members), (T, WIDTH))
    model = example.model
    twin = linear_twin(example, lambda layers, x: layers[0](x), [model.w], [model.b])
    curvature = fitted(example, kfac_approx=setting)
    places = [torch.arange(E * WIDTH + E)]
    assert_block_of_twin(twin, curvature, "w", setting, places)


@settings
def test_a_channels_last_kernel(setting):
    """Its entries are counted in the order of its axes, not in that of its memory."""

    def make():
        conv = nn.Conv2d(3, E, 2).to(memory_format=torch.channels_last)
        return Functional(lambda model, x: model.conv(x).movedim(1, -1), E, conv=conv)

    example = seeded_case(make, (3, 3, 3))
    assert not example.model.conv.weight.is_contiguous()
    assert_kfac_block(example, fitted(example, kfac_approx=setting), "conv", setting)
    assert_dense_structures_are_exact(example)


#: Uses of parts of a (4, 3) weight that make no stack of equal matrices, and their treatment.
UNEQUAL = {
    "unequal": (
        lambda w, x: torch.cat([F.linear(x, w[:1]), F.linear(x, w[1:]).tanh()], -1),
        "diag",
    ),
    "halves and rest": (
        lambda w, x: F.linear(x, w[:2]) + F.linear(x, w[2:3]) * F.linear(x, w[3:]),
        "dense",
    ),
    "overlapping": (lambda w, x: F.linear(x, w[:2]) * F.linear(x, w[1:3]), "diag"),
    "whole and part": (lambda w, x: F.linear(x, w)[..., :2] * F.linear(x, w[:2]), "dense"),
    "part and transpose": (
        lambda w, x: F.linear(F.linear(x, w), w.T)[..., :2] * F.linear(x, w[:2]),
        "dense",
    ),
    "gaps": (lambda w, x: F.linear(x, w[::2]) * F.linear(x, w[1::2]), "diag"),
    "columns": (
        lambda w, x: F.linear(x[..., :1], w[:, :1]) + F.linear(x[..., 1:], w[:, 1:]),
        "diag",
    ),
    "windows": (lambda w, x: F.linear(x, w.unfold(0, 2, 1)[0].mT), "diag"),
    "flipped": (lambda w, x: F.linear(x, w.flip(0)), "diag"),
    "repeated": (lambda w, x: F.linear(x, w[:1].expand(4, -1)) * F.linear(x, w), "diag"),
}


@pytest.mark.parametrize("how", UNEQUAL)
def test_other_parts_are_exact(how):
    """What is no stack of equal matrices is no Kronecker product, but has exact entries."""
    use, kind = UNEQUAL[how]
    width = use(torch.zeros(4, WIDTH), torch.zeros(1, WIDTH)).shape[-1]
    example = seeded_case(
        lambda: Functional(lambda model, x: use(model.w, x), width, w=parameter(4, WIDTH)),
        (T, WIDTH),
    )
    curvature = fitted(example)
    assert curvature.coverage["w"] == kind
    assert_exact_blocks(example, curvature, ["w"])
    assert_dense_structures_are_exact(example)


def test_grouped_queries_have_an_exact_block():
    """Two query heads to one of keys and values: parts of three sizes."""

    def function(model, x):
        parts = zip(model.w.split([4, 2, 2]), model.b.split([4, 2, 2]), strict=True)
        q, k, v = (F.linear(x, w, b) for w, b in parts)
        q, k, v = q.unflatten(-1, (2, 2)).transpose(1, 2), k[:, None], v[:, None]
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)

    members = {"w": parameter(8, WIDTH), "b": parameter(8)}
    example = seeded_case(lambda: Functional(function, 4, **members), (T, WIDTH))
    curvature = fitted(example)
    assert curvature.coverage["w"] == curvature.coverage["b"] == "dense"
    assert_exact_blocks(example, curvature, ["w", "b"])
    assert_dense_structures_are_exact(example)


def test_parameters_whose_entries_lie_apart():
    """A whole one is used as any other; parts of one are no views of equal stretches of memory."""

    def function(model, x):
        return F.linear(x, model.w) + F.linear(x, model.v[:2]).sum(-1, keepdim=True)

    def make():
        w, v = torch.randn(WIDTH, E).T, torch.randn(WIDTH, E).T
        return Functional(function, E, w=nn.Parameter(w), v=nn.Parameter(v))

    example = seeded_case(make, (T, WIDTH))
    assert not (example.model.w.is_contiguous() or example.model.v.is_contiguous())
    curvature = fitted(example)
    assert curvature.coverage["w"] == "kron"
    assert_diagonal_blocks(example, curvature, ["v"])
    assert_dense_structures_are_exact(example)
