"""Embeddings, norms and attention in half precision: sums in float32, evidence near float64's.

Weights and inputs are rounded before they are compared, so that only the arithmetic differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from laws import Untouched, seeded_case
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.errors import KfacLaplaceError

VOCABULARY, T, WIDTH = 9, 5, 6
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STRUCTURES = ("kron", "diag", "full")
Batches = list[tuple[Tensor, Tensor]]

halves = pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
structures = pytest.mark.parametrize("structure", STRUCTURES)


class Reader(nn.Module):
    """Tokens looked up, normalised in three ways, convolved and attended to, pooled."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.groups = nn.GroupNorm(2, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.last = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embedding(ids))
        h = self.groups(self.conv(h.mT)).relu().mT
        h = self.last(h + self.attention(h, h, h)[0])
        return self.head(h.to(self.head.weight.dtype).mean(1))


# Roundings between an embedding and the output, and as many on the way back.
DEPTH = 2 * 12


def reader(dtype: torch.dtype) -> tuple[Reader, Batches]:
    """A float64 model whose weights the given precision holds exactly, with its batches."""
    torch.manual_seed(3)
    model = Reader()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
        parameter.data = parameter.data.to(dtype).double()
    ids, y = torch.randint(0, VOCABULARY, (7, T)), torch.randint(0, 3, (7,))
    return model.double(), list(zip(ids.split(3), y.split(3), strict=True))


def assert_near(la: Laplace, exact: Laplace, outputs: tuple[Tensor, Tensor], u: float) -> None:
    """The evidence is within a first-order bound of the float64 model's.

    An error e of the outputs moves a log-likelihood by at most 2 max|e|, as the gradient softmax(f)
    minus one-hot has at most the 1-norm 2. A relative error r of the curvature moves the
    log-determinant ratio by at most r times the effective number of parameters
    Σ h/(h + δ) ≤ log-det ratio. The curvature is a product of four vectors (two of inputs, two of
    gradients), each off by u √DEPTH: independent roundings of unit u add up in squares.
    """
    got, want = outputs
    likelihood = 2 * exact.n_data * (got.double() - want).abs().max().item()
    ratio = 0.5 * 4 * DEPTH**0.5 * u * exact.log_det_ratio.item()
    evidence = la.log_marginal_likelihood()
    assert evidence.dtype == torch.float64 and evidence.isfinite()
    assert abs(evidence - exact.log_marginal_likelihood()) < likelihood + ratio


def assert_summed_in_single_precision(la: Laplace) -> None:
    for block in la.curvature.blocks.values():
        stored = block.factors if block.kind == "kron" else [block.dense()]
        assert {tensor.dtype for tensor in stored} <= {torch.float32, torch.float64}
        assert block.eigenvalues().dtype == torch.float64


@halves
@structures
def test_models_in_half_precision(structure, dtype):
    model, batches = reader(dtype)
    exact = Laplace(model, hessian_structure=structure).fit(batches)
    low = copy.deepcopy(model).to(dtype)
    photograph = Untouched(low)
    la = Laplace(low, hessian_structure=structure).fit(batches)
    photograph.check()
    ids = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        outputs = (low(ids), model(ids))
    assert_summed_in_single_precision(la)
    assert_near(la, exact, outputs, torch.finfo(dtype).eps / 2)
    assert set(la.coverage.values()) == set(exact.coverage.values())
    for options in ({}, {"pred_type": "linear", "n_samples": 3}, {"pred_type": "nn"}):
        probs = la(ids, **options).double()
        # probabilities of this dtype are rounded before they are added up
        torch.testing.assert_close(
            probs.sum(-1), torch.ones(len(ids)).double(), rtol=0, atol=2 * torch.finfo(dtype).eps
        )
    la.optimize_prior(tolerance=1e-3).calibrate()
    assert la.log_marginal_likelihood() > exact.log_marginal_likelihood()
    photograph.check()


@halves
@structures
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMS norm
def test_autocast_around_a_fit(structure, dtype):
    """The model runs in half precision; sums and evidence do not."""
    model, batches = reader(dtype)
    exact = Laplace(model, hessian_structure=structure).fit(batches)
    low = copy.deepcopy(model).float()
    ids = torch.cat([x for x, _ in batches])
    with torch.autocast("cpu", dtype=dtype):
        la = Laplace(low, hessian_structure=structure).fit(batches)
        with torch.no_grad():
            outputs = (low(ids), model(ids))
        assert torch.is_autocast_enabled("cpu")
    assert_summed_in_single_precision(la)
    assert_near(la, exact, outputs, torch.finfo(dtype).eps / 2)


@structures
@pytest.mark.parametrize(
    ("body", "head"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_models_of_several_precisions(structure, body, head):
    coarse = min(body, head, key=lambda dtype: torch.finfo(dtype).bits)
    model, batches = reader(coarse if coarse != torch.float32 else torch.bfloat16)
    exact = Laplace(model, hessian_structure=structure).fit(batches)
    mixed = copy.deepcopy(model).to(body)
    mixed.head.to(head)
    dtypes = [p.dtype for p in mixed.parameters()]
    la = Laplace(mixed, hessian_structure=structure).fit(batches)
    ids = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        outputs = (mixed(ids), model(ids))
    assert_summed_in_single_precision(la)
    assert_near(la, exact, outputs, torch.finfo(coarse).eps / 2)
    for options in ({}, {"pred_type": "linear"}, {"pred_type": "nn"}, {"link_approx": "mc"}):
        assert la(ids, n_samples=3, **options).isfinite().all()
    assert [p.dtype for p in mixed.parameters()] == dtypes


class Switches:
    """The global switches that a pass turns, as they were."""

    def __init__(self) -> None:
        self.found = self._now()

    def check(self) -> None:
        assert self._now() == self.found

    def _now(self) -> tuple[bool, bool, bool, bool]:
        return (
            torch.backends.mha.get_fastpath_enabled(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )


class Encoder(nn.Module):
    """torch's own encoder, whose evaluation mode has a fused path without derivatives."""

    def __init__(self, norm_first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 7, 0.1, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, 0])


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


BAD: dict[str, Callable[[Laplace, Tensor, Tensor], object]] = {
    "label out of range": lambda la, x, y: la.fit([(x, y + 3)]),
    "non-finite input": lambda la, x, y: la.fit([(x, y), (x * torch.nan, y)]),
    "wrong width": lambda la, x, y: la(x[..., :-1]),
    "wrong width, sampled weights": lambda la, x, y: la(x[..., :-1], pred_type="nn"),
    "wrong width, functions": lambda la, x, y: la.functional_samples(x[..., :-1], 2),
    "too few validation data": lambda la, x, y: la.calibrate([], "validation"),
}


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_is_off_inside_and_as_it_was_outside(norm_first, enabled):
    """In evaluation mode, where the fused path would be taken."""
    example = seeded_case(lambda: Encoder(norm_first), (4, WIDTH))
    example.model.eval()
    with fast_path(enabled):
        switches, photograph = Switches(), Untouched(example.model)
        la = Laplace(example.model).fit(example.batches)
        assert set(la.coverage.values()) == {"kron", "dense"}
        la(example.x), la.functional_samples(example.x, 2), la.calibrate()
        for bad in BAD.values():
            with pytest.raises((KfacLaplaceError, RuntimeError, AssertionError)):
                bad(la, example.x, example.y)
            switches.check()
            photograph.check()
