"""How many examples are predicted: as the fit learned it from targets, else as the output says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue


class Attention(nn.Module):
    """A causal mask shared by all examples, before or after the data."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, attn_mask=mask)[0].tanh()).mean(1)


class Coordinates(nn.Module):
    """A grid of places first, the same for all; values at these for each example."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, grid: Tensor, values: Tensor) -> Tensor:
        both = torch.cat([grid.expand(len(values), -1, -1), values[..., None]], -1)
        return self.head(self.first(both).tanh().mean(1))


class Nested(nn.Module):
    """A shared table beside two inputs by example, in a mapping inside a list."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, shared: list[Tensor], own: dict[str, Tensor]) -> Tensor:
        scale = shared[0].mean(0) + shared[1].mean()
        return self.head((self.first(own["x"] * scale) + own["bias"][:, None]).tanh())


CAUSAL = torch.ones(3, 3).triu(1).bool()
GRID = torch.linspace(-1, 1, 8).reshape(4, 2).double()


@dataclass(frozen=True)
class Form:
    """A model and its inputs for n examples; what is shared may be as long as some n."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]


def data(n: int, *shape: int) -> Tensor:
    return torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)).double()[:n]


FORMS = {
    "mask second": Form(Attention, lambda n: (data(n, 3, 4), CAUSAL)),
    "mask first": Form(Attention, lambda n: {"mask": CAUSAL, "x": data(n, 3, 4)}),
    "mask second of a list": Form(Attention, lambda n: [data(n, 3, 4), CAUSAL]),
    "coordinates": Form(Coordinates, lambda n: (GRID, data(n, 4))),
    "coordinates with an axis of one": Form(Coordinates, lambda n: (GRID[None], data(n, 4))),
    "coordinates by name": Form(Coordinates, lambda n: {"grid": GRID, "values": data(n, 4)}),
    "nested": Form(
        Nested,
        lambda n: ([GRID.reshape(2, 4), GRID.flatten()[:3]], {"x": data(n, 4), "bias": data(n)}),
    ),
}
forms = pytest.mark.parametrize("name", FORMS)
STRUCTURES = ["kron", "diag", "full"]


def fitted(name: str, structure: str = "kron", sizes: tuple[int, ...] = (6, 2)) -> Laplace:
    torch.manual_seed(0)
    form = FORMS[name]
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    batches = [(form.inputs(n), y[:n]) for n in sizes]
    return Laplace(
        form.model().double(), hessian_structure=structure, kfac_approx="expand", prior_precision=3
    ).fit(batches)


def dense_probit(la: Laplace, name: str, n: int) -> Tensor:
    """Probabilities of n inputs by the covariance that dense algebra gives, block by block."""
    inputs = FORMS[name].inputs(n)
    params = dict(la.model.named_parameters())

    def run(values: dict[str, Tensor]) -> Tensor:
        given = inputs if isinstance(inputs, dict) else {}
        args = () if given else tuple(inputs)
        la.model.eval()
        return torch.func.functional_call(la.model, values, args, given)

    f = run(params).detach()
    jacobian = torch.func.jacrev(run)({k: p.detach() for k, p in params.items()})
    covariance = torch.zeros(n, 2, 2).double()
    for block in la.curvature.blocks.values():
        j = torch.cat([jacobian[p].detach().flatten(2) for p in block.params], -1)  # (n, 2, p)
        precision = block.dense() + 3 * torch.eye(j.shape[-1])
        covariance += j @ torch.linalg.inv(precision) @ j.mT
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return (f / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)


@forms
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_probabilities_are_those_of_dense_algebra(n, structure, name):
    """Masks of three rows and grids of four are no batch of three or four."""
    la = fitted(name, structure)
    want = dense_probit(la, name, n)
    got = la(FORMS[name].inputs(n), link_approx="probit")
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@forms
@pytest.mark.parametrize("n", [1, 3, 4])
def test_samples_have_a_row_for_each_example(name, n):
    la, x = fitted(name), FORMS[name].inputs(n)
    for pred_type in ("linear", "nn"):
        assert la(x, pred_type=pred_type, n_samples=2).shape == (n, 2)
    assert la.functional_samples(x, 3).shape == (3, n, 2)
    assert la.predictive_samples(x, 3).shape == (3, n, 2)
    assert la.predict(x).entropy.shape == (n,)


@pytest.mark.slow
@forms
@pytest.mark.parametrize("method", ["loo", "validation", "gridsearch"])
def test_calibration_counts_the_targets(name, method):
    """As many as a shared input has rows, too."""
    la = fitted(name)
    held_out = [(FORMS[name].inputs(n), torch.arange(n) % 2) for n in (3, 4, 1)]
    if method == "gridsearch":
        la.optimize_prior(method, val_loader=held_out)
    else:
        la.calibrate(None if method == "loo" else held_out, method)
    assert torch.isfinite(la(FORMS[name].inputs(2))).all()


@forms
def test_a_later_batch_as_long_as_a_shared_input(name):
    """What one batch has shown to be shared stays so, whatever the length of the next."""
    whole, parts = fitted(name, sizes=(6,)), fitted(name, sizes=(6,))
    x, y = FORMS[name].inputs, torch.tensor([0, 1, 0, 1])
    whole.fit([(x(6), torch.arange(6) % 2), (x(3), y[:3]), (x(4), y)])
    parts.fit([(x(3), y[:3]), (x(6), torch.arange(6) % 2), (x(4), y)])
    for block, want in zip(
        parts.curvature.blocks.values(), whole.curvature.blocks.values(), strict=True
    ):
        torch.testing.assert_close(block.dense(), want.dense(), rtol=1e-8, atol=1e-10)
    assert parts(x(3)).shape == (3, 2) and parts(x(1)).shape == (1, 2)


@forms
@pytest.mark.parametrize("n", [1, 3, 4])
def test_after_a_round_trip_through_a_file(name, n, tmp_path):
    la = fitted(name)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", la.model)
    x = FORMS[name].inputs(n)
    assert torch.equal(loaded(x), la(x))


def test_another_nesting_than_in_the_fit_is_settled_by_the_output():
    la, x = fitted("mask second"), data(2, 3, 4)
    want = la((x, CAUSAL))
    assert torch.equal(la({"mask": CAUSAL, "x": x}), want)
    assert torch.equal(la({"x": x, "mask": CAUSAL}), want)


# --- one example ----------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_an_example_without_its_axis():
    """nn.Linear would take it: the fit knows better."""
    la = Laplace(net()).fit([(data(6, 3), torch.arange(6) % 2)])
    x = data(6, 3)
    calls = {
        "call": lambda: la(x[0]),
        "linear": lambda: la(x[0], pred_type="linear"),
        "nn": lambda: la.functional_samples(x[0], pred_type="nn"),
        "a scalar": lambda: la(x[0, 0]),
    }
    for call in calls.values():
        with pytest.raises(InvalidValue, match=r"x: 2 axes are expected.*shape \(.*x\[None\]"):
            call()
    assert la(x[:1]).shape == (1, 2)
    with pytest.raises(InvalidType, match="no tensor"):
        la("text")


def test_an_example_without_its_axis_among_several_inputs():
    la, x = fitted("mask first"), data(2, 3, 4)
    with pytest.raises(InvalidValue, match=r"x\['x'\]: 3 axes are expected.*\(3, 4\)"):
        la({"mask": CAUSAL, "x": x[0]})


def test_images_without_their_axis():
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(-3), nn.Linear(18, 2)).double()
    x = data(5, 1, 4, 4)
    la = Laplace(model).fit([(x, torch.arange(5) % 2)])
    with pytest.raises(InvalidValue, match="4 axes are expected"):
        la(x[0])


def test_more_axes_than_in_the_fit_are_positions():
    """A grid of inputs: each row a sequence."""
    la = Laplace(net(), "regression").fit([(data(6, 3), data(6, 2))])
    mean, _ = la(data(4, 5, 3))
    assert mean.shape == (4, 5, 2)


class Squeezed(nn.Module):
    """squeeze() at the end takes the axis of a single example too."""

    def __init__(self, outputs: int, generic: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, outputs)
        self.centre = nn.Parameter(torch.randn(2, 4)) if generic else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.centre is not None:  # no rule: gradients by a copy for each example
            distances = (h[..., None, :] - self.centre).square().sum(-1).sqrt()
            h = h + distances.sum(-1, keepdim=True)
        return self.last(h).squeeze()


SQUEEZED = {
    "one output": (1, (3,), "regression"),
    "one logit": (1, (3,), "binary"),
    "positions": (1, (5, 3), "regression"),
    "classes": (3, (3,), "classification"),
    "classes at positions": (3, (5, 3), "classification"),
}


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SQUEEZED)
def test_one_example_of_a_model_that_squeezes(name, structure, generic):
    """Shapes and numbers are those of the first of several."""
    outputs, shape, likelihood = SQUEEZED[name]
    torch.manual_seed(0)
    model, x = Squeezed(outputs, generic).double(), data(6, *shape)
    f = model(x).detach()
    y = f.argmax(-1) if likelihood == "classification" else (f > 0).double()
    la = Laplace(model, likelihood, hessian_structure=structure).fit([(x, y)])
    two, one = la(x[:2]), la(x[:1])
    for several, single in zip(
        *([v] if isinstance(v, Tensor) else v for v in (two, one)), strict=True
    ):
        torch.testing.assert_close(single, several[:1])
    for pred_type in ("glm", "nn"):
        samples = [
            la.functional_samples(
                x[:n], 3, pred_type=pred_type, generator=torch.Generator().manual_seed(0)
            )
            for n in (2, 1)
        ]
        torch.testing.assert_close(samples[1], samples[0][:, :1])
        targets = la.predictive_samples(x[:1], 3, pred_type=pred_type)
        assert targets.shape == samples[1].shape
    if likelihood == "regression":
        torch.testing.assert_close(la(x[:1], joint=True)[0], la(x[:1])[0].flatten())
    torch.testing.assert_close(la.predict(x[:1]).entropy, la.predict(x[:2]).entropy[:1])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SQUEEZED)
@pytest.mark.parametrize("sizes", [(5, 1), (1, 5), (1, 1, 1, 3)])
def test_a_last_batch_of_one_adds_to_a_fit(name, structure, sizes):
    outputs, shape, likelihood = SQUEEZED[name]
    torch.manual_seed(0)
    model, x = Squeezed(outputs).double(), data(6, *shape)
    f = model(x).detach()
    y = f.argmax(-1) if likelihood == "classification" else (f > 0).double()
    want = Laplace(model, likelihood, hessian_structure=structure, kfac_approx="expand")
    want.fit([(x, y)])
    got = Laplace(model, likelihood, hessian_structure=structure, kfac_approx="expand")
    got.fit([*zip(x.split(sizes), y.split(sizes), strict=True)])
    assert got.n_data == 6
    torch.testing.assert_close(got.log_likelihood, want.log_likelihood)
    if structure != "kron":  # products of sums depend on the batches where there are several rows
        torch.testing.assert_close(got.log_det_ratio, want.log_det_ratio)
    got.calibrate([(x[:1], y[:1]), (x[1:], y[1:])], "validation")
    assert torch.isfinite(got.posterior_scale)


@pytest.mark.parametrize("name", SQUEEZED)
def test_a_batch_of_one_in_the_loss_of_a_tuner(name):
    """Its loss is that of a batch which repeats it."""
    outputs, shape, likelihood = SQUEEZED[name]
    torch.manual_seed(0)
    model, x = Squeezed(outputs).double(), data(1, *shape)
    twice = x.expand(2, *shape)
    f = model(twice).detach()
    y = f.argmax(-1) if likelihood == "classification" else (f > 0).double()
    tuner = MarglikTuner(model, likelihood, n_data=6)
    torch.testing.assert_close(tuner.loss(model(x), y[:1]), tuner.loss(model(twice), y))


def test_small_budgets_take_examples_one_by_one():
    torch.manual_seed(0)
    model, x = Squeezed(1).double(), data(6, 3)
    y = model(x).detach() + 0.1
    want = Laplace(model, "regression").fit([(x, y)])(x)
    got = Laplace(model, "regression", memory_budget=1).fit([(x, y)])(x)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


class Folded(nn.Module):
    """The output's first axis has examples and positions."""

    def __init__(self):
        super().__init__()
        self.net, self.fold = nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        f = self.net(x)
        return f.flatten(0, 1) if f.ndim > 2 else f


def test_outputs_that_have_no_row_for_each_example():
    la = Laplace(Folded().double()).fit([(data(6, 3), torch.arange(6) % 2)])
    for call in (lambda x: la(x), lambda x: la(x, pred_type="nn"), la.functional_samples):
        with pytest.raises(
            InvalidValue, match=r"no row for each example.*\(10, 2\) for 2 examples"
        ):
            call(data(2, 5, 3))
