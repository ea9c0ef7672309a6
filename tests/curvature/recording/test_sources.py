"""Parts and rearrangements of parameters keep the blocks of the linear layers that they make."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functional import (
    Functional,
    assert_block_of_twin,
    in_batches,
    linear_twin,
    parameter,
    places_of,
)
from laws import (
    EXACT,
    REORDERED,
    assert_complete,
    assert_dense_structures_are_exact,
    assert_same_blocks,
    dense_blocks,
    fitted,
    relative_error,
    seeded_case,
)

from kfac_laplace import Curvature, Laplace

T, WIDTH, E = 5, 3, 4
settings = pytest.mark.parametrize("setting", ["expand", "reduce"])

#: Ways of taking a packed parameter apart into three equal parts.
THIRDS = {
    "index": lambda w: (w[:E], w[E : 2 * E], w[2 * E :]),
    "negative": lambda w: (w[: -2 * E], w[-2 * E : -E], w[-E:]),
    "chunk": lambda w: w.chunk(3),
    "split": lambda w: w.split(E),
    "tensor_split": lambda w: torch.tensor_split(w, 3),
    "narrow": lambda w: [w.narrow(0, k * E, E) for k in range(3)],
    "unbind": lambda w: w.view(3, E, *w.shape[1:]).unbind(),
    "unflatten": lambda w: list(w.unflatten(0, (3, E))),
}


def attention(layers, x):
    """One head of attention over three layers."""
    q, k, v = (layer(x) for layer in layers)
    return (q @ k.mT).softmax(-1) @ v


def cross_attention(layers, x):
    """Queries from two tokens, keys and values from three others."""
    q, k, v = layers[0](x[:, :2]), layers[1](x[:, 2:]), layers[2](x[:, 2:])
    return (q @ k.mT).softmax(-1) @ v


def without_keys(layers, x):
    """The second part is used by nothing."""
    return layers[0](x) * layers[2](x)


def twice(layers, x):
    """The first part is used again on what the others made of the input."""
    return layers[0](layers[1](x)[..., :WIDTH].tanh()) + layers[0](x) * layers[2](x)


BODIES = {f.__name__: f for f in (attention, cross_attention, without_keys, twice)}


def packed(thirds, body):
    """A case of a body over three parts of one weight and one bias."""

    def function(model, x):
        pairs = zip(thirds(model.w), thirds(model.b), strict=True)
        return body([partial(F.linear, weight=w, bias=b) for w, b in pairs], x)

    members = {"w": parameter(3 * E, WIDTH), "b": parameter(3 * E)}
    return seeded_case(lambda: Functional(function, E, **members), (T, WIDTH))


def packed_places(thirds):
    """Where the weight and the bias of each part lie in the joint block."""
    weights = places_of(thirds, torch.Size((3 * E, WIDTH)))
    biases = places_of(thirds, torch.Size((3 * E,)), start=3 * E * WIDTH)
    return [torch.cat(pair) for pair in zip(weights, biases, strict=True)]


@settings
@pytest.mark.parametrize("how", THIRDS)
@pytest.mark.parametrize("body", BODIES)
def test_equal_parts_have_a_block_each(body, how, setting):
    """Rows are counted by part: cross-attention has more keys than queries, and one has none."""
    thirds, body = THIRDS[how], BODIES[body]
    example = packed(thirds, body)
    model = example.model
    twin = linear_twin(example, body, thirds(model.w), thirds(model.b))
    curvature = fitted(example, kfac_approx=setting)
    assert_complete(curvature, model)
    places = packed_places(thirds)
    if body is without_keys:
        places[1] = None
    assert_block_of_twin(twin, curvature, "w", setting, places)


@pytest.mark.parametrize("body", BODIES)
def test_parts_are_exact_in_dense_structures(body):
    assert_dense_structures_are_exact(packed(THIRDS["chunk"], BODIES[body]))


@settings
def test_parts_of_a_bias_alone(setting):
    """Without joint blocks the bias is split like its weight: B of each part."""
    example = packed(THIRDS["chunk"], attention)
    separate = fitted(example, kfac_approx=setting, joint_bias=False)
    joint = fitted(example, kfac_approx=setting)
    assert {"w", "b"} <= set(separate.blocks) and separate.coverage["b"] == "kron"
    size = 3 * E * WIDTH  # under a joint block the bias's corner is B times one
    corner = joint.blocks["w"].dense()[size:, size:]
    assert relative_error(separate.blocks["b"].dense(), corner) < EXACT
    rest = joint.blocks["w"].dense()[:size, :size]
    assert relative_error(separate.blocks["w"].dense(), rest) < EXACT


@pytest.mark.parametrize("body", BODIES)
@settings
def test_parts_do_not_depend_on_the_split_into_batches(body, setting):
    example = packed(THIRDS["chunk"], BODIES[body])
    together = dense_blocks(fitted(in_batches(example, 7), kfac_approx=setting))
    for sizes in ((1, 3, 3), (1,) * 7, (3, 3, 1)):
        split = dense_blocks(fitted(in_batches(example, *sizes), kfac_approx=setting))
        assert_same_blocks(split, together, REORDERED)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_parts_and_folds_merge_and_survive_saving(structure, tmp_path):
    def function(model, x):
        return attention([partial(F.linear, weight=w) for w in model.w.chunk(3)], x @ model.v)

    members = {"w": parameter(3 * E, WIDTH), "v": parameter(WIDTH, WIDTH)}
    example = seeded_case(lambda: Functional(function, E, **members), (T, WIDTH))
    la = Laplace(example.model, example.likelihood, hessian_structure=structure)
    la.fit(example.batches)
    la.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", example.model)
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    torch.testing.assert_close(loaded(example.x), la(example.x), rtol=REORDERED, atol=0)
    options = {"hessian_structure": structure}
    parts = [
        Curvature(example.model, example.likelihood, **options).fit(example.batches[k::2])
        for k in (0, 1)
    ]
    merged = dense_blocks(parts[0].merge(parts[1]))
    assert_same_blocks(merged, dense_blocks(la.curvature), REORDERED)
