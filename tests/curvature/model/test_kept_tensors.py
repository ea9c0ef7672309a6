"""Models that keep tensors between calls in evaluation mode, and rows that the data pick."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case
from laws import EXACT, fitted, relative_error, seeded_case
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.errors import UnsupportedUse


class Keeping(nn.Module):
    """A function of a parameter, computed once in evaluation mode; `train` forgets it."""

    def __init__(self, clears: bool = True):
        super().__init__()
        self.points, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 2)
        self.kept: Tensor | None = None
        self.clears = clears

    def train(self, mode: bool = True) -> Keeping:
        if self.clears:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kept is None:
            self.kept = self.points.tanh()
        return self.head((x[:, None] - self.kept).square().sum(-1))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_keeps_is_of_its_own_weights(training):
    example = seeded_case(Keeping, (4,))
    model = example.model.train(training)
    before = model(example.x).detach()
    la = Laplace(model, "classification").fit(example.batches)
    for pred_type in ("glm", "linear", "nn"):
        la(example.x, pred_type=pred_type, n_samples=3)
        assert model.training == training
        model.eval()
        assert torch.equal(model(example.x), before)
        model.train(training)
    exact = oracles.ggn(Keeping.train(model, True), *example.data, ["points"]).diagonal()
    block = la.curvature.blocks["points"]
    assert relative_error(block.dense().diagonal(), exact) < EXACT


def test_weight_samples_reach_what_a_model_keeps():
    example = seeded_case(Keeping, (4,))
    options = {"subset_of_weights": ["points"], "prior_precision": 0.1}
    la = Laplace(example.model, "classification", **options).fit(example.batches)
    assert la.predict(example.x, pred_type="nn", n_samples=20).covariance.diagonal().min() > 1e-6


def test_a_parameter_behind_what_a_model_never_forgets_is_refused():
    example = seeded_case(lambda: Keeping(clears=False), (4,))
    example.model.kept = None
    with pytest.raises(UnsupportedUse, match="points.*keeps tensors"):
        fitted(example)


class NormThenTokens(nn.Module):
    """The gradient of a batch norm's output comes with its channels last."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.mix, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens).tanh().mean(1))


def test_batch_norm_in_a_batch_of_one():
    """torch's own backward pass is wrong there, unless gradients are contiguous."""
    example = seeded_case(NormThenTokens, (2, 4, 4))
    with torch.no_grad():
        example.model.norm.weight.uniform_(0.5, 1.5)
        example.model.norm.running_mean.normal_()
    whole = fitted(example, [example.data[:2]])
    alone = fitted(example, [(x[None], y[None]) for x, y in zip(*example.data[:2], strict=True)])
    for name, block in whole.blocks.items():
        assert relative_error(alone.blocks[name].dense(), block.dense()) < EXACT, name
    la = Laplace(example.model, "classification").fit(example.batches)
    torch.testing.assert_close(la(example.x[:1]), la(example.x)[:1], rtol=1e-10, atol=1e-12)


class Picked(nn.Module):
    """The rows above a threshold, mixed by a layer and put back."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        out = torch.zeros_like(x)
        out[chosen] = self.mix(x[chosen]).tanh()
        return self.head(out.mean(1))


def test_rows_that_the_data_pick_are_exact_or_refused_in_later_batches():
    """Two of each example first: the layout looks regular. Then one and three."""
    torch.manual_seed(4)
    model, x = Picked().double(), torch.randn(4, 4, 3).double()
    x[..., 0] = x[..., 0].abs()
    for example, count in enumerate((2, 2, 1, 3)):
        x[example, count:, 0] *= -1
    y = torch.randint(0, 2, (4,))
    example = Case(model, "classification", [(x[:2], y[:2]), (x[2:], y[2:])])
    with pytest.raises(UnsupportedUse, match="mix"):
        fitted(example, hessian_structure="full")
    ragged_first = Case(model, "classification", example.batches[::-1])
    block = fitted(ragged_first, hessian_structure="full").blocks["full"]
    exact = oracles.ggn(model, x, y, "classification", list(block.params))
    assert relative_error(block.dense(), exact) < EXACT
