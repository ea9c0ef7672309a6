"""Models whose layers do not see the examples where one would look for them."""

import oracles
import pytest
import torch
from cases import build
from laws import relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.errors import InvalidValue, UnsupportedUse


def data(*shape, classes=3):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64, generator=draw)
    return x, torch.randint(0, classes, (shape[0],), generator=draw)


def seeded(module):
    torch.manual_seed(0)
    return module().double()


class InPlaceTokens(nn.Module):
    """A token-wise linear layer with a bias returns a view, which is then written to."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        y += x
        return self.g(y.relu_().mean(1))


def test_in_place_operations_on_token_layers_keep_the_factors():
    model, (x, y) = seeded(InPlaceTokens), data(6, 5, 4)
    curvature = Curvature(model, "classification", joint_bias=False).fit([(x, y)])
    assert set(curvature.coverage.values()) == {"kron"}
    want = oracles.ggn(model, x, y, "classification", ["f.bias"])
    assert relative_error(curvature.blocks["f.bias"].dense(), want) < 1e-12


class Latents(nn.Module):
    """Queries come from learned latents, without a batch axis; the batch enters behind them."""

    def __init__(self):
        super().__init__()
        self.latent = nn.Parameter(torch.randn(2, 4))
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.query(self.latent) @ x.mT).softmax(-1)  # (n, 2, t)
        return self.head((scores @ x).mean(1))


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_a_layer_without_a_batch_axis_gets_its_exact_diagonal(setting):
    """Its gradient rows sum over the examples: no Kronecker factor could be right."""
    model, (x, y) = seeded(Latents), data(6, 5, 4)
    curvature = Curvature(model, "classification", kfac_approx=setting).fit([(x, y)])
    assert curvature.coverage["query.weight"] == "diag"
    want = oracles.ggn(model, x, y, "classification", ["query.weight"]).diagonal()
    assert relative_error(curvature.blocks["query.weight"].dense().diagonal(), want) < 1e-12


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(torch.tanh(self.f(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("n", [5, 8])
def test_batches_of_one_do_not_mislead_the_predictive(n):
    """Where the examples lie shows only in a batch of several: also when that is a test batch."""
    model, (x, y) = seeded(SequenceFirst), data(8, 8, 4)
    singles = Laplace(model, "classification").fit([(x[i : i + 1], y[i : i + 1]) for i in range(8)])
    whole = Laplace(model, "classification").fit([(x, y)])
    torch.testing.assert_close(
        singles.predict(x[:n]).covariance, whole.predict(x[:n]).covariance, rtol=1e-10, atol=1e-12
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.g((mask @ torch.tanh(self.f(x))).mean(1))


def test_inputs_shared_by_all_examples_are_not_cut():
    """A (t, t) mask looks like a batch where t equals the number of examples."""
    model, (x, y) = seeded(Masked), data(5, 5, 4)
    mask = torch.ones(5, 5, dtype=torch.float64).tril()
    with pytest.raises(UnsupportedUse, match="alone"):
        Curvature(model, "classification").accumulate({"x": x, "mask": mask}, y)
    curvature = Curvature(model, "classification").accumulate({"x": x, "mask": mask[None]}, y)
    assert curvature.n_data == 5


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_a_model_without_any_layer_rule(structure):
    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.w)

    model, (x, y) = seeded(Centres), data(6, 4)
    curvature = Curvature(model, "classification", hessian_structure=structure).fit([(x, y)])
    want = oracles.ggn(model, x, y, "classification", ["w"]).diagonal()
    block = next(iter(curvature.blocks.values()))
    assert relative_error(block.dense().diagonal(), want) < 1e-12


def test_last_layer_refuses_a_head_that_is_used_in_another_way_too():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.tanh(self.fc(self.e(tokens).mean(1)))
            return nn.functional.linear(h, self.e.weight)

    model = seeded(Tied)
    tokens, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 5, (6,))
    with pytest.raises(InvalidValue, match="last"):
        Curvature(model, "classification", subset_of_weights="last_layer").fit([(tokens, y)])


@pytest.mark.parametrize(
    ("name", "shape"), [("mlp-tanh", (7, 1)), ("mlp-regression", (2, 7)), ("tokens", (7,))]
)
def test_targets_of_another_layout_are_refused(name, shape):
    case = build(name)
    wrong = case.y.flatten()[: torch.Size(shape).numel()].reshape(shape)
    with pytest.raises(InvalidValue, match="target|match"):
        Curvature(case.model, case.likelihood).accumulate(case.x, wrong)
