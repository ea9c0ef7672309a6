"""Parameters that cannot be treated are told by name, with the remedy, before any data are read."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from laws import EXACT, assert_dense_structures_are_exact, fitted, relative_error, seeded_case
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidType, UnsupportedUse

WIDTH = 4


class Spectral(nn.Module):
    """A Fourier layer with a complex weight, or with its real and imaginary parts."""

    shape: tuple[int, ...] = (3, 3)

    def __init__(self, whole: bool = True):
        super().__init__()
        self.a, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        parts = torch.randn(*self.shape, 2, dtype=torch.float64)
        self.w = nn.Parameter(torch.view_as_complex(parts) if whole else parts)

    @property
    def weight(self) -> Tensor:
        return self.w if self.w.is_complex() else torch.view_as_complex(self.w)

    def mixed(self, z: Tensor) -> Tensor:
        return z @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.mixed(torch.fft.rfft(self.a(x)))
        return self.head(torch.fft.irfft(z, n=WIDTH).tanh())


class Phases(Spectral):
    """A complex vector, elementwise."""

    shape = (3,)

    def mixed(self, z: Tensor) -> Tensor:
        return z * self.weight


class Magnitude(Spectral):
    """Real products, with the weight's absolute values and parts."""

    def forward(self, x: Tensor) -> Tensor:
        real = self.weight.abs() + torch.view_as_real(self.weight).sum(-1)
        return self.head(self.a(x) + (x @ real).sum(-1, keepdim=True))


def no_data():
    """A loader that is not to be read."""
    raise AssertionError("data were read")
    yield


ENTRIES = {
    "Laplace": lambda m, **o: Laplace(m, **o).fit(no_data()),
    "Curvature": lambda m, **o: Curvature(m, "classification", **o).fit(no_data()),
    "tuner": lambda m, **o: MarglikTuner(m, "classification", 7, **o).step(no_data()),
    "loss": lambda m, **o: MarglikTuner(m, "classification", 7, **o).loss(
        torch.zeros(2, 2), torch.zeros(2, dtype=torch.long)
    ),
    "training": lambda m, **o: marglik_training(m, no_data(), **o),
}


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("make", [Spectral, Phases, Magnitude])
def test_complex_parameters_are_refused_with_the_remedy(make, entry, structure):
    with pytest.raises(UnsupportedUse, match=r"^w: complex.*complex128.*view_as_complex"):
        ENTRIES[entry](make(), hessian_structure=structure)


@pytest.mark.parametrize("options", [{"subset_of_weights": ["w", "a.*"]}, {"uncovered": "error"}])
def test_complex_parameters_are_refused_where_they_are_asked_for(options):
    with pytest.raises(UnsupportedUse, match="^w: complex"):
        Laplace(Spectral(), **options)


@pytest.mark.parametrize("make", [Spectral, Phases, Magnitude])
def test_the_parts_of_a_complex_number_are_exact(make):
    """The remedy: the same network with a real parameter (..., 2)."""
    assert_dense_structures_are_exact(seeded_case(lambda: make(whole=False)))


OUTSIDE = {
    "frozen": {},
    "by pattern": {"subset_of_weights": ["a.*", "head.*"]},
    "last layer": {"subset_of_weights": "last_layer"},
    "uncovered": {"uncovered": "freeze"},
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("make", [Spectral, Phases, Magnitude])
def test_complex_parameters_outside_the_posterior_do_no_harm(make, how):
    """The other blocks are those of the network with this parameter as a constant."""
    example = seeded_case(make)
    example.model.w.requires_grad_(how != "frozen")
    la = Laplace(example.model, **OUTSIDE[how]).fit(example.batches)
    assert la.coverage["w"] == "frozen" and la.coverage["head.weight"] == "kron"
    full = {"hessian_structure": "full"} if how != "uncovered" else {}
    for block in fitted(example, **OUTSIDE[how], **full).blocks.values():
        if block.kind != "kron":
            exact = oracles.ggn(example.model, *example.data, list(block.params))
            assert relative_error(block.dense(), exact) < EXACT, block.params
    x, before = example.x, example.model(example.x).softmax(-1).detach()
    la.prior_precision = 1e14
    for pred_type in ("glm", "linear", "nn"):
        probs = la(x, pred_type=pred_type, n_samples=2)
        torch.testing.assert_close(probs, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["last layer", "by pattern", "frozen"])
def test_the_tuner_leaves_complex_parameters_outside_alone(how):
    example = seeded_case(Spectral)
    example.model.w.requires_grad_(how != "frozen")
    options = {"prior_precision": 1.0, **OUTSIDE[how]}
    tuner = MarglikTuner(example.model, "classification", len(example.x), **options)
    tuner.prepare(example.batches)
    loss = tuner.loss(*tuner.forward(example.batches[0]))
    assert loss.dtype == torch.float64 and bool(torch.isfinite(loss))
    names = tuner.laplace(example.batches).curvature.params
    inside = [p for name, p in example.model.named_parameters() if name in names]
    x, y = example.batches[0]
    penalty = sum(p.square().sum() for p in inside) / (2 * len(example.x))
    nll = torch.nn.functional.cross_entropy(example.model(x), y)
    torch.testing.assert_close(loss, nll + penalty)
    tuner.step(example.batches)


@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
def test_complex_outputs_are_refused(likelihood):
    class Complex(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(super().forward(x), x[:, :1])

    y = torch.zeros(4, dtype=torch.long) if likelihood == "classification" else torch.zeros(4, 1)
    with pytest.raises(InvalidType, match=r"model output.*real.*complex64.*view_as_real"):
        Laplace(Complex(3, 1 + (likelihood == "classification")), likelihood).fit(
            [(torch.randn(4, 3), y)]
        )


LAZY = {
    "all": lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)),
    "one": lambda: nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)),
    "a norm": lambda: nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d()),
    "buffers": lambda: nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d(affine=False)),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("which", LAZY)
def test_lazy_layers_are_to_be_run_first(which, entry):
    torch.manual_seed(0)
    model, x, y = LAZY[which](), torch.randn(7, 3), torch.arange(7) % 2
    with pytest.raises(UnsupportedUse, match="lazy.*Run the model once"):
        ENTRIES[entry](model)
    model(x)
    Laplace(model.eval()).fit([(x, y)])


@pytest.mark.parametrize("entry", ENTRIES)
def test_models_made_in_inference_mode_are_to_be_copied(entry):
    torch.manual_seed(0)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedUse, match=r"^0\.weight, 0\.bias, .*inference mode.*deepcopy"):
        ENTRIES[entry](model)
    la = Laplace(copy.deepcopy(model)).fit([(torch.randn(7, 3), torch.arange(7) % 2)])
    assert bool(torch.isfinite(la.log_marginal_likelihood()))
