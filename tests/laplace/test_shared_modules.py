"""Modules registered twice, checkpoints, inference mode: every call leaves the model as it was."""

import pytest
import torch
from cases import N_DATA, build
from laws import Untouched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_laplace import Laplace, MarglikTuner


def shared() -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.PReLU(), nn.Linear(4, 3)).double()


def data():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64, generator=draw)
    return x, torch.randint(0, 3, (6,), generator=draw)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_every_call_leaves_a_module_registered_twice(structure):
    """`torch.func.functional_call` restores such a slot to the wrong tensor."""
    model, (x, y) = shared(), data()
    parameters = dict(model.named_parameters())
    photo = Untouched(model)
    la = Laplace(model, "classification", hessian_structure=structure).fit([(x, y)])
    la.optimize_prior().calibrate()
    for call in (
        lambda: la(x),
        lambda: la(x, pred_type="nn", n_samples=2),
        lambda: la(x, pred_type="linear", n_samples=2),
        lambda: la.functional_samples(x, 2),
        lambda: MarglikTuner(model, "classification", 6).step([(x, y)]),
    ):
        call()
        photo.check()
        assert model[0].weight is model[2].weight is parameters["0.weight"]
    fresh = Laplace(shared(), "classification", hessian_structure=structure).fit([(x, y)])
    again = Laplace(model, "classification", hessian_structure=structure).fit([(x, y)])
    assert torch.equal(again(x), fresh(x))


class Checkpointed(nn.Module):
    """A checkpointed part with a parameter that only the generic treatment covers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


def test_checkpointing_with_a_generic_parameter():
    torch.manual_seed(0)
    model, (x, y) = Checkpointed().double(), data()
    plain = nn.Sequential(model.inner, model.head)
    got = Laplace(model, "classification").fit([(x, y)])
    want = Laplace(plain, "classification").fit([(x, y)])
    torch.testing.assert_close(got.log_det_ratio, want.log_det_ratio)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_what_inference_mode_kept_can_be_differentiated_later(structure):
    model, (x, y) = shared(), data()
    la = Laplace(model, "classification", hessian_structure=structure).fit([(x, y)])
    with torch.inference_mode():
        la(x)
        la.log_marginal_likelihood()
    before = float(la.log_marginal_likelihood())
    assert float(la.optimize_prior().log_marginal_likelihood()) >= before


def test_what_has_no_factors_is_listed_once(caplog):
    case = build("vit")
    tuner = MarglikTuner(case.model, "classification", N_DATA)
    with caplog.at_level("INFO", logger="kfac_laplace"):
        for _ in range(3):
            tuner.step(case.batches)
    assert sum("without Kronecker factors" in r.getMessage() for r in caplog.records) == 1


def test_fitting_leaves_the_global_generator_that_loaders_draw_from():
    model, (x, y) = shared(), data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 2, shuffle=True)
    state = torch.get_rng_state()
    Laplace(model, "classification").fit(loader)
    assert torch.equal(torch.get_rng_state(), state)
