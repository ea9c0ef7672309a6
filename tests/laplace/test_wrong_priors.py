"""A prior that does not fit the parameters is refused after one batch, with nothing changed."""

from __future__ import annotations

import pytest
import torch
from cases import build

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidValue, KfacLaplaceError

#: Options that cannot fit a network of two layers and 31 parameters, whatever its data.
WRONG = {
    "seven precisions": {"prior_precision": torch.ones(7)},
    "two of a scalar": {"prior_precision": torch.ones(2), "prior_structure": "scalar"},
    "no such layer": {"prior_precision": {"9.*": 1.0, "*": 2.0}},
    "a layer left out": {"prior_precision": {"0.*": 1.0}},
    "weight and bias": {"prior_precision": {"0.weight": 1.0, "*": 2.0}},
    "two means": {"prior_mean": torch.zeros(2)},
    "a mean of no layer": {"prior_mean": {"9.*": 1.0, "*": 0.0}},
    "a structure of no layer": {"prior_structure": {"9.*": "scalar", "*": "layerwise"}},
    "seven of each": {
        "prior_precision": torch.ones(7),
        "prior_structure": "diag",
        "hessian_structure": "diag",
    },
    "of the last layer": {
        "prior_precision": torch.ones(2),
        "subset_of_weights": "last_layer",
    },
}


class Counting:
    """A loader that counts the batches read."""

    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.read += 1
            yield batch


@pytest.mark.parametrize("wrong", WRONG)
def test_fit_reads_one_batch(wrong):
    case = build("mlp-tanh")
    la, loader = Laplace(case.model, case.likelihood, **WRONG[wrong]), Counting(case.batches)
    with pytest.raises(InvalidValue, match="prior_"):
        la.fit(loader)
    assert loader.read == 1
    assert not la.curvature.blocks and la.n_data == 0


@pytest.mark.parametrize("value", [torch.ones(7), {"9.*": 1.0}])
def test_a_fitted_posterior_stays(value):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches)
    before = la.log_marginal_likelihood(), la.curvature.ggn
    with pytest.raises(InvalidValue, match="prior_precision"):
        la.prior_precision = value
    assert la.log_marginal_likelihood() == before[0] and la.curvature.ggn is before[1]
    la.fit(case.batches, override=False)
    assert la.n_data == 2 * before[1].n_data


@pytest.mark.parametrize("wrong", WRONG)
def test_the_tuner_prepares_or_steps_with_one(wrong):
    case = build("mlp-tanh")
    n_data = len(case.x)
    for verb in ("prepare", "step"):
        tuner, loader = MarglikTuner(case.model, case.likelihood, n_data, **WRONG[wrong]), None
        loader = Counting(case.batches)
        with pytest.raises(KfacLaplaceError, match="prior_"):
            getattr(tuner, verb)(loader)
        assert loader.read == 1
        assert not tuner.history and not tuner.groups and tuner.state_dict()["epoch"] == 0


def test_training_in_one_call():
    case = build("mlp-tanh")
    before = {name: p.clone() for name, p in case.model.state_dict().items()}
    with pytest.raises(InvalidValue, match="prior_precision"):
        marglik_training(
            case.model, case.batches, case.likelihood, prior_prec_init=torch.ones(7), n_epochs=3
        )
    assert all(torch.equal(p, before[name]) for name, p in case.model.state_dict().items())
