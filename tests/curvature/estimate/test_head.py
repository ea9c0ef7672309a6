"""The bottleneck cut: d vectors from the head's input give the blocks of C - 1 from the output."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import case
from heads import CLASSES, LIKELIHOODS, MODELS, WIDTH, Uncut, example, mlp
from laws import EXACT, assert_same_blocks, dense_blocks, fitted
from torch import Tensor, nn

from kfac_laplace import Categorical, Curvature, Exact, Laplace
from kfac_laplace.curvature.estimate.head import _same


@dataclass
class Spy:
    """Keeps the shapes of the vectors that `torch.autograd.grad` is called with."""

    original: object
    shapes: list[torch.Size]

    def __call__(self, outputs, inputs, grad_outputs=None, **options):
        if isinstance(grad_outputs, Tensor):
            self.shapes.append(grad_outputs.shape)
        return self.original(outputs, inputs, grad_outputs, **options)


def counts(monkeypatch, curvature: Curvature, x: Tensor, y: Tensor) -> tuple[int, int]:
    """How many vectors (n, t, C) and (n, d) a batch takes, when row layouts are known."""
    curvature.accumulate(x, y)
    spy = Spy(torch.autograd.grad, [])
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", spy)
        curvature.accumulate(x, y)
    whole = sum(len(shape) == 3 and shape[-1] == CLASSES for shape in spy.shapes)
    return whole, spy.shapes.count((len(x), WIDTH))


@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_of_the_uncut_pass(name, likelihood, joint_bias):
    data = example(name, likelihood)
    options = {"joint_bias": joint_bias}
    (cut, uncut) = (
        Curvature(data.model, LIKELIHOODS[likelihood], fisher=fisher, **options).fit(data.batches)
        for fisher in (Exact(), Uncut())
    )
    assert cut.coverage == uncut.coverage and cut.n_data == uncut.n_data == len(data.x)
    assert_same_blocks(dense_blocks(cut), dense_blocks(uncut), EXACT)


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_either_setting_is_cut_alike(name, setting):
    data = example(name)
    cut = fitted(data, kfac_approx=setting)
    uncut = fitted(data, kfac_approx=setting, fisher=Uncut())
    assert_same_blocks(dense_blocks(cut), dense_blocks(uncut), EXACT)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "head alone"])
def test_as_many_vectors_as_the_head_is_wide(name, monkeypatch):
    data = example(name)
    cut = Curvature(data.model, "classification")
    whole, narrow = counts(monkeypatch, cut, data.x, data.y)
    assert narrow == WIDTH and whole <= 1  # one asks which rows outputs see
    uncut = Curvature(data.model, "classification", fisher=Uncut())
    whole, narrow = counts(monkeypatch, uncut, data.x, data.y)
    assert narrow == 0 and whole >= CLASSES - 1


def test_a_head_alone_needs_no_backward_pass(monkeypatch):
    data = example("head alone")
    curvature = Curvature(data.model, "classification")
    assert counts(monkeypatch, curvature, data.x, data.y) == (0, 0)
    last = Curvature(example("cnn").model, "classification", subset_of_weights="last_layer")
    data = example("cnn")
    last.accumulate(data.x, data.y)  # the whole network was tracked until the layer was found
    assert counts(monkeypatch, last, data.x, data.y) == (0, 0)


def test_a_narrow_spectrum_needs_fewer_vectors(monkeypatch):
    """W of rank 2: W^T Lambda W has two eigenvalues above rounding."""
    data = example("mlp")
    with torch.no_grad():
        head = data.model[4].weight
        head[:, 2:] = head[:, :2] @ torch.ones(2, 2, dtype=head.dtype)
    curvature = Curvature(data.model, "classification")
    assert counts(monkeypatch, curvature, data.x, data.y) == (0, 2)
    assert_same_blocks(
        dense_blocks(fitted(data)), dense_blocks(fitted(data, fisher=Uncut())), EXACT
    )


class Tied(nn.Module):
    """An encoder's weight is the head as well."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(WIDTH, CLASSES, bias=False)
        self.body = nn.Linear(CLASSES, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(self.body(self.table(x).tanh()).tanh())


class Derived(nn.Module):
    """The head's weight is computed from a parameter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, WIDTH)
        self.raw = nn.Parameter(torch.randn(CLASSES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x).tanh(), self.raw.exp())


class DataBias(nn.Module):
    """The head's bias depends on data too."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, WIDTH)
        self.shift = nn.Linear(3, CLASSES)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.shift(x), self.body(x).tanh(), self.head.weight.mT)


class Rescaled(nn.Module):
    """The output is not the head's."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Loose(nn.Module):
    """A parameter without a layer rule below the head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.atan2(x, self.scale))


class Hyper(nn.Module):
    """The output is a product of two activations: there is no head."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, WIDTH)
        self.right = nn.Linear(2, CLASSES)
        self.register_buffer("seed", torch.randn(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.left(x).tanh(), self.right(self.seed).tanh())


NOT_CUT = {
    "tied": (Tied, (WIDTH,), {}),
    "derived": (Derived, (3,), {}),
    "data bias": (DataBias, (3,), {}),
    "rescaled": (Rescaled, (3,), {}),
    "hyper": (Hyper, (3,), {}),
    "loose": (Loose, (3,), {}),
    "narrow": (lambda: nn.Sequential(nn.Linear(3, 11), nn.Tanh(), nn.Linear(11, 12)), (3,), {}),
    "tokens": (mlp, (5, 3), {}),
    "diag": (mlp, (3,), {"hessian_structure": "diag"}),
    "full": (mlp, (3,), {"hessian_structure": "full"}),
    "empirical": (mlp, (3,), {"fisher": "empirical"}),
}


@pytest.mark.parametrize("name", NOT_CUT)
def test_other_passes_are_not_cut(name, monkeypatch):
    make, shape, options = NOT_CUT[name]
    torch.manual_seed(6)
    data = case(make(), shape, "classification")
    curvature = Curvature(data.model, "classification", **options)
    whole, narrow = counts(monkeypatch, curvature, data.x, data.y)
    assert whole > 0 and narrow == 0
    fisher = {"fisher": Uncut()} if "fisher" not in options else {}
    assert_same_blocks(
        dense_blocks(fitted(data, **options)), dense_blocks(fitted(data, **options | fisher)), 0.0
    )


def test_own_alignment_of_outputs_is_not_cut():
    """A likelihood that changes outputs on the way is beyond the head."""

    class Tempered(Categorical):
        def align(self, output: Tensor, class_axis: int) -> Tensor:
            return super().align(output, class_axis) / 3

    data = example("mlp")
    got, want = (
        Curvature(data.model, Tempered(), fisher=fisher).fit(data.batches)
        for fisher in (Exact(), Uncut())
    )
    assert_same_blocks(dense_blocks(got), dense_blocks(want), 0.0)


def test_own_roots_are_respected():
    """A subclass with another Lambda takes the way by its Hessian."""

    class Doubled(Categorical):
        def roots(self, f: Tensor):
            yield from (2**0.5 * root for root in super().roots(f))

        def hessian(self, f: Tensor) -> Tensor:
            return 2 * super().hessian(f)

    data = example("cnn")
    got = Curvature(data.model, Doubled()).fit(data.batches)
    want = Curvature(data.model, Doubled(), fisher=Uncut()).fit(data.batches)
    assert_same_blocks(dense_blocks(got), dense_blocks(want), EXACT)


@pytest.mark.parametrize("certainty", [10.0, 30.0, 60.0])
def test_saturated_outputs_keep_their_digits(certainty):
    """Probabilities of 1 - 1e-26: neither B of the head nor W^T Lambda W is lost in rounding."""
    data = example("mlp")
    with torch.no_grad():
        data.model[4].weight.mul_(0.1)
        data.model[4].bias[3] = certainty
    got, want = fitted(data), fitted(data, fisher=Uncut())
    for name, block in want.blocks.items():
        a, b = got.blocks[name].factors.output, block.factors.output
        assert ((a - b).norm() / b.norm()).item() < EXACT, name


def test_ignored_examples_alone_leave_zeros():
    data = example("mlp")
    likelihood = Categorical(ignore_index=3)
    curvature = Curvature(data.model, likelihood).accumulate(data.x, torch.full_like(data.y, 3))
    assert all(not block.dense().any() for block in curvature.blocks.values())
    assert all(block.dense().dtype == torch.float64 for block in curvature.blocks.values())


def test_batches_add_up_and_evidence_follows():
    """Split biases hold factors of their own: in-place sums of later batches do not meet."""
    data = example("cnn")
    options = {"joint_bias": False, "prior_precision": 0.3}
    got = Laplace(data.model, "classification", **options).fit(data.batches)
    want = Laplace(data.model, "classification", fisher=Uncut(), **options).fit(data.batches)
    torch.testing.assert_close(
        got.log_marginal_likelihood(), want.log_marginal_likelihood(), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_lower_precision(dtype):
    """Roots are rounded to the model's own precision, as gradients are."""
    data = example("cnn")
    model, x = data.model.to(dtype), data.x.to(dtype)
    got = Curvature(model, "classification").accumulate(x, data.y)
    want = Curvature(model, "classification", fisher=Uncut()).accumulate(x, data.y)
    # a few dozen roundings of relative size eps
    tolerance = 32 * torch.finfo(dtype).eps
    assert_same_blocks(dense_blocks(got), dense_blocks(want), tolerance)


def test_one_memory_is_one_tensor_only_if_it_is_read_alike():
    numbers = torch.randn(3, 3, dtype=torch.complex128)
    assert _same(numbers.imag, numbers.imag)
    assert not _same(numbers.imag, numbers.conj().imag)  # a negative view
    assert not _same(numbers, numbers.conj())
    assert not _same(numbers.real, numbers.imag)
