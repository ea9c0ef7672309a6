"""Which rows of a layer belong to which example: found from the first batch, never assumed."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case, Pool
from laws import (
    EXACT,
    assert_dense_structures_are_exact,
    assert_kfac_block,
    fitted,
    relative_error,
    seeded_case,
)
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.errors import UnsupportedUse

SETTINGS = ("expand", "reduce")


class Flattened(nn.Module):
    """Positions folded into the leading axis: rows are (n t)."""

    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # (n, t, i)
        n, t, _ = x.shape
        if self.order == "example-major":
            h = self.inner(x.flatten(0, 1)).relu().unflatten(0, (n, t))
        elif self.order == "position-major":
            h = self.inner(x.transpose(0, 1).flatten(0, 1)).relu().unflatten(0, (t, n))
            h = h.transpose(0, 1)
        elif self.order == "position-first":
            h = self.inner(x.transpose(0, 1)).relu().transpose(0, 1)
        else:
            h = self.inner(x).relu()
        return self.head(h.mean(1))


class MaskedMean(nn.Module):
    """Positions folded position-major, mean over the positions that a mask leaves.

    The last input feature is the mask; padded positions get no gradient.
    """

    def __init__(self, folded: bool):
        super().__init__()
        self.folded = folded
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:  # (n, t, 3 + 1)
        x, mask = x[..., :3], x[..., 3:]
        n, t, _ = x.shape
        if self.folded:
            h = self.inner(x.transpose(0, 1).flatten(0, 1)).tanh()
            h = h.unflatten(0, (t, n)).transpose(0, 1)
        else:
            h = self.inner(x).tanh()
        return self.head((h * mask).sum(1) / mask.sum(1))


class PositionMask(nn.Module):
    """Two inputs, of which one has no example axis but may be as long as the batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3) + 0.1 * torch.randn(3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head((mask @ (x * self.scale)).tanh().mean(1))


def twins(plain: nn.Module, other: nn.Module, x: Tensor) -> tuple[Case, Case]:
    """Two modules with the same weights and the same function, in two layouts."""
    other = other.double()
    other.load_state_dict(plain.double().state_dict())
    assert torch.allclose(plain(x), other(x), atol=1e-14)
    y = torch.randint(0, 2, (len(x),))
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    return Case(plain, "classification", batches), Case(other, "classification", batches)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("positions", [2, 3, 6, 7])
@pytest.mark.parametrize("order", ["example-major", "position-major", "position-first"])
def test_rows_find_their_examples(order, positions, setting):
    """Reduce has to know which rows are one example's; dimension 0 is not always the batch."""
    torch.manual_seed(6)
    x = torch.randn(7, positions, 3).double()
    plain, folded = twins(Flattened("plain"), Flattened(order), x)
    assert_kfac_block(plain, fitted(folded, kfac_approx=setting), "inner", setting)
    if setting == "reduce":
        assert_dense_structures_are_exact(folded)


@pytest.mark.parametrize("order", ["example-major", "position-major", "position-first"])
def test_a_dead_example_in_the_first_batch_does_not_mislead(order):
    """Without any gradient an example shows nothing about the layout of its rows."""
    for dead in range(3):
        torch.manual_seed(6)
        x = torch.randn(7, 3, 3).double()
        plain = Flattened("plain")
        with torch.no_grad():
            plain.inner.weight[:, 0] = -1.0
        x[dead, :, 0] = 100.0  # every unit of the rectifier is off
        plain, folded = twins(plain, Flattened(order), x)
        curvature = fitted(folded, kfac_approx="reduce")
        assert_kfac_block(plain, curvature, "inner", "reduce")
        assert_dense_structures_are_exact(folded)


@pytest.mark.parametrize("padding", ["left", "right", "alternating"])
def test_padded_positions_do_not_mislead(padding):
    """Rows without a gradient fit several layouts: more examples have to be asked."""
    torch.manual_seed(6)
    n, t = 7, 3
    x = torch.cat([torch.randn(n, t, 3), torch.ones(n, t, 1)], -1).double()
    for example in range(n):
        kept = {"left": t - 1, "right": 0, "alternating": example % t}[padding]
        x[example, :, 3] = 0.0
        x[example, kept, 3] = 1.0
    plain, folded = twins(MaskedMean(False), MaskedMean(True), x)
    try:
        curvature = fitted(folded, kfac_approx="reduce")
    except UnsupportedUse:
        return  # refusing is right as well; a wrong row_layout is not
    assert_kfac_block(plain, curvature, "inner", "reduce", live=x[..., 3] > 0)
    assert_dense_structures_are_exact(folded)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_layers_that_mix_examples_are_refused(structure):
    """Batch statistics in evaluation mode: there is no such thing as one example's Jacobian."""

    def make() -> nn.Module:
        norm = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
        return nn.Sequential(nn.Conv2d(1, 3, 2), norm, nn.Tanh(), Pool(2, 3), nn.Linear(3, 2))

    example = seeded_case(make, (1, 3, 3))
    with pytest.raises(UnsupportedUse):
        fitted(example, hessian_structure=structure, kfac_approx="reduce")


def test_an_input_without_an_example_axis_is_not_cut_into_examples():
    """The mask is (t, t) with t equal to the batch size: chance must not decide what it means."""
    torch.manual_seed(4)
    n = positions = 3
    model = PositionMask().double()
    mask = torch.rand(positions, positions).double()
    x, y = torch.randn(n, positions, 3).double(), torch.randint(0, 2, (n,))

    class WithMask(nn.Module):
        """The same model with the mask inside, for the oracle."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x, mask)

    curvature = Curvature(model, "classification")
    try:
        curvature.accumulate({"x": x, "mask": mask}, y)
    except UnsupportedUse:
        return  # refusing is right as well; a wrong number is not
    exact = oracles.ggn(WithMask(), x, y, "classification", ["model.scale"])
    assert relative_error(curvature.blocks["scale"].dense(), exact.diagonal().diag()) < EXACT
