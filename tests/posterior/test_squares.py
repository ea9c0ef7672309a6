"""Weighted sums of squares: values, gradients and second ones, and nothing that waits or is big."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_laplace.posterior.squares import WeightedSquares, squared_norms

SHAPES = {"a": (3, 2), "b": (4,), "c": (3, 2), "d": (), "e": (), "f": (5, 7)}
BUNDLES = (("a", "c"), ("b",), ("d", "e"), ("f",))
MEANS = (0.0, torch.linspace(-1, 1, 4, dtype=torch.float64), 0.25, 0.0)


def tensors(dtypes=torch.float64):
    torch.manual_seed(0)
    dtypes = dtypes if isinstance(dtypes, dict) else dict.fromkeys(SHAPES, dtypes)
    return {
        name: torch.randn(shape, dtype=torch.float64).to(dtypes[name]).requires_grad_()
        for name, shape in SHAPES.items()
    }


def weights():
    flat = torch.linspace(0.5, 3, len(SHAPES), dtype=torch.float64)
    return flat.split([len(bundle) for bundle in BUNDLES])


def function():
    return WeightedSquares(BUNDLES, MEANS, weights())


def naive(theta):
    """By autograd's own operations, in float64."""
    total = 0.0
    for bundle, mean, weight in zip(BUNDLES, MEANS, weights(), strict=True):
        for name, w in zip(bundle, weight, strict=True):
            total = total + w * (theta[name].double() - mean).square().sum()
    return total


def test_norms_are_those_of_each_tensor():
    theta = tensors()
    got = squared_norms([[theta[name] for name in bundle] for bundle in BUNDLES], MEANS)
    expected = [
        (theta[name] - mean).square().sum()
        for bundle, mean in zip(BUNDLES, MEANS, strict=True)
        for name in bundle
    ]
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-14, atol=0)


# Mixed: a bundle of two precisions, and a half-precision tensor.
MIXED = {name: torch.float32 for name in SHAPES} | {"c": torch.float64, "f": torch.bfloat16}


@pytest.mark.parametrize(
    ("dtypes", "rtol"),
    # rounding of single precision; of bfloat16, in which the gradient of "f" is stored
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (MIXED, 1e-2)],
    ids=["double", "single", "mixed"],
)
def test_value_and_gradients_equal_autograds_own(dtypes, rtol):
    theta = tensors(dtypes)
    got, expected = function()(theta), naive(theta)
    torch.testing.assert_close(got.double(), expected, rtol=min(rtol, 1e-6), atol=0)
    gradients = torch.autograd.grad(got, list(theta.values()))
    references = torch.autograd.grad(expected, list(theta.values()))
    for name, g, e in zip(theta, gradients, references, strict=True):
        assert g.dtype == theta[name].dtype and g.shape == theta[name].shape
        torch.testing.assert_close(g, e, rtol=rtol, atol=1e-6 * (rtol > 1e-10))


def test_gradients_are_scaled_by_what_comes_after():
    """As by a gradient scaler, or by other terms of a loss."""
    theta = tensors()
    got = torch.autograd.grad(function()(theta).exp(), list(theta.values()))
    expected = torch.autograd.grad(naive(theta).exp(), list(theta.values()))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=0)


def test_it_can_be_differentiated_twice():
    names, values = list(SHAPES), list(tensors().values())
    function_of = function()

    def call(*theta):
        return function_of(dict(zip(names, theta, strict=True)))

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


def test_frozen_tensors_count_and_get_no_gradient():
    theta = tensors()
    theta["a"].requires_grad_(False)
    value = function()(theta)
    torch.testing.assert_close(value, naive(theta), rtol=1e-14, atol=0)
    value.backward()
    assert theta["a"].grad is None and theta["c"].grad is not None


def test_tensors_changed_in_between_are_noticed():
    """The gradient would be that of other weights."""
    theta = tensors()
    value = function()(theta)
    with torch.no_grad():
        theta["f"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_it_can_be_copied_and_used_in_inference_mode():
    first = function()
    with torch.inference_mode():
        expected = first(tensors(torch.float32))
    theta = tensors(torch.float32)
    value = copy.deepcopy(first)(theta)
    assert value.item() == expected.item()
    value.backward()


class Watch(TorchDispatchMode):
    """The largest tensor made, and every operation that waits for the device."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = str(func)
        if "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name:
            self.waits.append(name)
        given = {memory_of(leaf) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and memory_of(leaf) not in given:
                self.largest = max(self.largest, leaf.numel())
        return found


def memory_of(tensor):
    """Where its storage lies: that of a view is its base's."""
    return tensor.untyped_storage().data_ptr()


def test_the_device_is_never_waited_for():
    theta, chosen = tensors(torch.float32), function()
    chosen(theta)
    with Watch() as watch:
        chosen(theta).backward()
    assert not watch.waits


def test_no_temporary_of_a_large_tensor_but_its_gradient():
    theta = {"large": torch.randn(300, 400, requires_grad=True), "small": torch.randn(5)}
    theta["small"].requires_grad_()
    chosen = WeightedSquares((("large",), ("small",)), (0.0, 0.0), torch.ones(2).double().split(1))
    with Watch() as watch:
        value = chosen(theta)
    assert watch.largest <= 300 * 400 // 2**12 + 1
    with Watch() as watch:
        value.backward()
    assert watch.largest == 300 * 400


def test_a_float32_sum_over_many_entries_keeps_its_digits():
    theta = {"w": torch.rand(2_000_000)}
    chosen = WeightedSquares((("w",),), (0.0,), (torch.ones(1, dtype=torch.float64),))
    exact = theta["w"].double().square().sum()
    # norms of pieces of 2¹² entries, added pairwise; sums in order lose 1e-4, dot products 2e-5
    assert abs(float(chosen(theta)) / float(exact) - 1) < 1e-6
