"""All groups of a posterior together: a vector, tensors by name, matrices."""

import pytest
import torch
from posterior.some_layouts import LAYOUTS, PARAMS, P


def test_sizes_and_shapes_follow_the_order_of_the_parameters():
    assert LAYOUTS.size == P and list(LAYOUTS.shapes) == list(PARAMS)


@pytest.mark.parametrize("lead", [(), (5,)])
def test_flatten_undoes_pack(lead):
    vector = torch.randn(*lead, P)
    assert torch.equal(LAYOUTS.flatten(LAYOUTS.pack_vector(vector)), vector)


def test_tensors_by_parameter_have_their_own_shapes():
    tensors = LAYOUTS.by_parameter(torch.arange(float(P)))
    assert list(tensors) == list(PARAMS)
    assert tensors["lin.weight"].shape == (2, 3) and tensors["conv.weight"].shape == (4, 1, 2)
    flat = torch.cat([t.flatten() for t in tensors.values()])
    assert torch.equal(flat, torch.arange(float(P)))


def test_a_part_keeps_both_orders():
    part = LAYOUTS.part(["position", "lin.weight"])
    assert list(part.groups) == ["position", "lin.weight"]
    assert part.params == ["position", "lin.weight", "lin.bias"] and part.size == 11
