"""The caller's model leaves every pass as it came, also after an exception half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, build, case
from laws import Untouched, assert_same_blocks, dense_blocks, fitted
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.errors import InvalidValue

STRUCTURES = ("kron", "diag", "full")


class LoaderBroke(Exception):
    """Not one of the library's errors: what a user's data pipeline may throw."""


class ModelBroke(Exception):
    """What a user's forward may throw."""


class Fragile(nn.Module):
    """Raises for inputs above 100, after two layers have run."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x))
        if bool((x > 100).any()):
            raise ModelBroke
        return self.head(torch.dropout(h.tanh(), 0.3, self.training))


def fragile() -> Case:
    """A model with everything that may be disturbed: modes, gradients, buffers, hooks, flags."""
    example = case(Fragile(), (3,), "classification")
    model = example.model
    example.model(example.x).sum().backward()
    model.head.bias.requires_grad_(False)
    model.stem.weight.grad = None
    model.norm.eval()
    model.stem.register_forward_hook(lambda module, args, output: None)
    model.head.weight.register_hook(lambda grad: grad)
    return example


def loader_breaks(example: Case) -> Iterator:
    yield example.batches[0]
    raise LoaderBroke


def nan_batch(example: Case) -> Iterator:
    x, y = example.batches[1]
    yield example.batches[0]
    yield x.clone().index_fill_(1, torch.tensor([1]), float("nan")), y


def model_breaks(example: Case) -> Iterator:
    x, y = example.batches[1]
    yield example.batches[0]
    yield x + 1000, y


def label_out_of_range(example: Case) -> Iterator:
    x, y = example.batches[1]
    yield example.batches[0]
    yield x, torch.full_like(y, 3)


FAILURES: dict[str, tuple[Callable, type[Exception]]] = {
    "loader raises": (loader_breaks, LoaderBroke),
    "nan in a batch": (nan_batch, InvalidValue),
    "forward raises": (model_breaks, ModelBroke),
    "label out of range": (label_out_of_range, InvalidValue),
}


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_successful_pass_leaves_the_model_as_found(structure, fisher):
    example = fragile()
    photograph = Untouched(example.model)
    fitted(example, hessian_structure=structure, fisher=fisher)
    photograph.check()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vit", "cnn", "tokens", "frozen-weight", "twice"])
def test_any_model_and_mode_is_left_as_found(name, training):
    example = build(name)
    example.model.train(training)
    photograph = Untouched(example.model)
    for structure in STRUCTURES:
        fitted(example, hessian_structure=structure)
    photograph.check()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_pass_leaves_the_model_as_found(failure, structure):
    make, error = FAILURES[failure]
    example = fragile()
    photograph = Untouched(example.model)
    with pytest.raises(error):
        fitted(example, make(example), hessian_structure=structure)
    photograph.check()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("failure", [f for f in FAILURES if f != "loader raises"])
def test_a_failed_accumulate_leaves_the_sums_as_they_were(failure, structure):
    make, error = FAILURES[failure]
    example = fragile()
    curvature = Curvature(example.model, "classification", hessian_structure=structure)
    curvature.accumulate(*example.batches[0])
    before, n_data = dense_blocks(curvature), curvature.n_data
    bad = list(make(example))[1]
    with pytest.raises(error):
        curvature.accumulate(*bad)
    assert curvature.n_data == n_data
    assert_same_blocks(dense_blocks(curvature), before, 0.0)
    # and goes on as if nothing had happened
    curvature.accumulate(*example.batches[1])
    clean = fitted(example, example.batches[:2], hessian_structure=structure)
    assert_same_blocks(dense_blocks(curvature), dense_blocks(clean), 1e-12)


def test_a_failed_monte_carlo_batch_does_not_disturb_the_labels_of_the_next():
    """tanh hides the infinity from the output: the batch fails after its labels were drawn."""
    example = fragile()
    x, y = example.batches[1]
    hidden = x.clone()
    hidden[0, 1] = float("-inf")
    assert torch.isfinite(example.model.eval()(hidden)).all()
    curvature = Curvature(example.model, "classification", fisher="mc", seed=5)
    curvature.accumulate(*example.batches[0])
    with pytest.raises(InvalidValue):
        curvature.accumulate(hidden, y)
    curvature.accumulate(x, y)
    clean = fitted(example, example.batches[:2], fisher="mc", seed=5)
    assert_same_blocks(dense_blocks(curvature), dense_blocks(clean), 1e-12)


def test_inputs_and_targets_are_left_as_found():
    example = build("mlp-relu-inplace")
    x, y = example.x.clone(), example.y.clone()
    fitted(example)
    assert torch.equal(example.x, x)
    assert torch.equal(example.y, y)
    assert not example.batches[0][0].requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients_do_not_matter(mode):
    """A caller's habit around evaluation code must not zero the blocks."""
    example = build("cnn")
    with mode():
        inside = dense_blocks(fitted(example))
        assert not torch.is_grad_enabled()
    assert_same_blocks(inside, dense_blocks(fitted(example)), 0.0)


def test_blocks_carry_no_graph():
    for structure in STRUCTURES:
        for block in fitted("vit", hessian_structure=structure).blocks.values():
            assert not block.dense().requires_grad
