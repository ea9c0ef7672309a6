"""The prior's part of the training loss: the naive formula for every way to share precisions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_laplace import MarglikTuner
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.marglik.live import LiveParameters

N = 7
SHARINGS = {
    "scalar": "scalar",
    "layerwise": "layerwise",
    "unit": "unit",
    "diag": "diag",
    "patterns": {"*.weight": "scalar", "*": "layerwise"},
    "mixed": {"*.weight": "unit", "*": "diag"},
}
CASES = ("mlp-tanh", "cnn", "twice", "frozen-bias", "frozen-weight", "vit")
# Loss and output in the model's precision; the naive formula is in float64.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def deltas(la):
    """δ of each entry by parameter name."""
    prior = la.posterior.prior
    spread, groups = prior.by_group(la.prior_precision), prior.layouts.groups.items()
    flat = prior.layouts.flatten({n: spread[n].expand(la_.matrix) for n, la_ in groups})
    return prior.layouts.by_parameter(flat)


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_naive_formula(name, sharing, dtype):
    """½/N Σ δ (θ − μ)², entry by entry; also where weights are tied or frozen."""
    case = build(name)
    options = {"prior_structure": SHARINGS[sharing], "prior_mean": {"*weight": 0.25, "*": 0.0}}
    tuner = MarglikTuner(
        case.model, case.likelihood, N, hessian_structure="diag", joint_bias=False, **options
    )
    tuner.step(case.batches)  # precisions of no round value
    delta = deltas(tuner.laplace(case.batches))
    case.model.to(dtype)
    params = trainable(case.model)
    assert set(params) == set(delta)

    output = case.model(case.x.to(dtype)).detach()
    penalty = tuner.loss(output, case.y) - F.cross_entropy(output, case.y)
    expected = 0.0
    for parameter, p in params.items():
        shift = p.double() - (0.25 if parameter.endswith("weight") else 0.0)
        expected = expected + (delta[parameter] * shift.square()).sum() / (2 * N)
    torch.testing.assert_close(penalty.double(), expected, **CLOSE[dtype])
    found = torch.autograd.grad(penalty, list(params.values()))
    wanted = torch.autograd.grad(expected, list(params.values()))
    for g, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(g, e.to(g.dtype), **CLOSE[dtype])


def test_parameters_of_several_dtypes():
    """Half-precision weights are pulled in single precision; gradients have their own dtype."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16())
    tuner = MarglikTuner(model, "classification", N, prior_precision=3.0)
    output, y = torch.randn(5, 2), torch.randint(2, (5,))
    penalty = tuner.loss(output, y) - F.cross_entropy(output, y)
    params = trainable(model)
    expected = 3.0 * sum(p.double().square().sum() for p in params.values()) / (2 * N)
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-5, atol=1e-6)
    for p, g in zip(params.values(), torch.autograd.grad(penalty, params.values()), strict=True):
        assert g.dtype == p.dtype
        torch.testing.assert_close(g, 3.0 * p.detach() / N)


class Watch(TorchDispatchMode):
    """Counts reads of numbers from the device, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.waits, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_penalty_never_waits_for_the_device(sharing):
    case = build("cnn")
    options = {"hessian_structure": "diag", "joint_bias": False, "prior_mean": {"*bias": 1, "*": 0}}
    tuner = MarglikTuner(
        case.model, "classification", N, prior_structure=SHARINGS[sharing], **options
    )
    tuner.step(case.batches)
    output = case.model(case.x)
    tuner.loss(output, case.y)
    with Watch() as fit:
        tuner.likelihood.align_target(case.y, output.detach()[:, None])
    with Watch() as watch:
        tuner.loss(output, case.y).backward()
    assert watch.waits == fit.waits  # the labels' range, and nothing else


@pytest.mark.parametrize("sharing", ["scalar", "layerwise", "patterns"])
def test_nothing_of_the_size_of_the_weights_is_made(sharing):
    model = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 2))
    x, y = torch.randn(5, 200), torch.randint(2, (5,))
    tuner = MarglikTuner(
        model, "classification", N, prior_structure=SHARINGS[sharing], joint_bias=False
    )
    tuner.prepare([(x, y)])
    output = model(x)
    tuner.loss(output, y)
    with Watch() as watch:
        tuner.loss(output, y)
    assert watch.largest <= 300  # outputs, and small tensors of one shape


def test_a_copied_tuner_pulls_the_copied_model():
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, "classification", N)
    tuner.step(case.batches)
    tuner.loss(case.model(case.x), case.y)
    twin = copy.deepcopy(tuner)
    with torch.no_grad():
        case.model[0].weight.zero_()
    twin.loss(twin.model(case.x), case.y).backward()
    assert case.model[0].weight.grad is None
    gradient = twin.model[0].weight.grad
    assert gradient is not None and gradient.any()


# --- where the parameters are ---------------------------------------------------------------------


def network():
    return nn.Sequential(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Linear(2, 2))


NAMES = ("0.0.weight", "1.bias")


def test_live_parameters_are_those_of_the_names():
    model = network()
    live = LiveParameters(model, NAMES)
    assert list(live()) == list(NAMES)
    assert live()["0.0.weight"] is model[0][0].weight and live()["1.bias"] is model[1].bias


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "bias", nn.Parameter(torch.ones(2))),
        lambda model: model.__setitem__(1, nn.Linear(2, 2)),
        lambda model: model.__setitem__(0, nn.Sequential(nn.Linear(3, 2))),
        lambda model: model.load_state_dict(network().state_dict(), assign=True),
    ],
    ids=["parameter", "module", "parent", "assigned state"],
)
def test_what_was_replaced_is_found(change):
    model = network()
    live = LiveParameters(model, NAMES)
    before = live()
    change(model)
    named = dict(model.named_parameters())
    assert all(live()[name] is named[name] for name in NAMES)
    assert any(live()[name] is not before[name] for name in NAMES)


def test_parameters_of_the_module_itself():
    layer = nn.Linear(2, 2)
    assert LiveParameters(layer, ("bias",))() == {"bias": layer.bias}


# --- options by pattern ---------------------------------------------------------------------------


def test_initial_precisions_by_pattern_wait_for_a_batch():
    case = build("mlp-tanh")
    given = {"2.*": 5.0, "*": 0.5}
    tuner = MarglikTuner(case.model, "classification", N, prior_precision=given)
    with pytest.raises(InvalidValue, match="prepare"):
        tuner.loss(case.model(case.x), case.y)
    with pytest.raises(NotFitted, match="prepare"):
        tuner.hyperparameters()
    state = tuner.state_dict()
    tuner.prepare(case.batches)
    assert tuner.hyperparameters()["prior_precision"].tolist() == [0.5, 5.0]
    squares = [sum(p.square().sum() for p in case.model[i].parameters()) for i in (0, 2)]
    expected = F.cross_entropy(case.model(case.x), case.y) + (
        0.5 * squares[0] + 5.0 * squares[1]
    ) / (2 * N)
    torch.testing.assert_close(tuner.loss(case.model(case.x), case.y), expected)

    resumed = MarglikTuner(case.model, "classification", N)
    resumed.load_state_dict(state)
    resumed.prepare(case.batches)
    assert resumed.hyperparameters()["prior_precision"].tolist() == [0.5, 5.0]
    stepped = MarglikTuner(case.model, "classification", N, prior_precision=given, n_hypersteps=1)
    stepped.step(case.batches)
    start = torch.tensor([0.5, 5.0], dtype=torch.float64).log()
    moved = (stepped.hyperparameters()["prior_precision"].log() - start).abs()
    torch.testing.assert_close(moved, torch.full((2,), 0.1, dtype=torch.float64))  # Adam's first


def test_patterns_that_divide_a_block_leave_the_tuner_as_it_was():
    case = build("mlp-tanh")
    given = {"*.bias": 1.0, "*": 2.0}
    tuner = MarglikTuner(case.model, "classification", N, prior_precision=given)
    for call in (tuner.prepare, tuner.step):
        with pytest.raises(InvalidValue, match="joint_bias=False"):
            call(case.batches)
    assert not tuner.groups and not tuner.history


def test_means_by_pattern_need_no_batch():
    case = build("vit")
    means = {"norm.weight": 1, "*": 0}
    tuner = MarglikTuner(case.model, "classification", N, prior_mean=means, prior_precision=1.0)
    squares = sum(
        (p - float(name == "norm.weight")).square().sum()
        for name, p in trainable(case.model).items()
    )
    expected = F.cross_entropy(case.model(case.x), case.y) + squares / (2 * N)
    before = tuner.loss(case.model(case.x), case.y)
    torch.testing.assert_close(before, expected)
    tuner.prepare(case.batches)
    torch.testing.assert_close(tuner.loss(case.model(case.x), case.y), before)
