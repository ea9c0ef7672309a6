"""A sharing of a user's own gets everything: evidence, steps, loss, samples, state."""

import pytest
import torch
from cases import build
from posterior import dense
from posterior.toy_sharing import ByKind

from kfac_laplace import KfacLaplaceError, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.sharing import Sharing

STRUCTURES = ("kron", "diag", "full", "lowrank")
OPTIONS = {"prior_structure": ByKind(), "joint_bias": False}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_terms_equal_dense_algebra(structure):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure, **OPTIONS)
    assert la.prior_precision.numel() == 2
    la.prior_precision = torch.tensor([0.5, 3.0])
    delta = torch.cat(
        [torch.full((p.numel(),), 3.0 if p.ndim > 1 else 0.5) for p in case.model.parameters()]
    )
    delta, hessian, theta = (
        delta.double(),
        dense.hessian(la, case.model),
        dense.theta(la, case.model),
    )
    expected = (hessian + delta.diag()).logdet() - delta.log().sum()
    torch.testing.assert_close(la.log_det_ratio, expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(la.scatter, (delta * theta**2).sum(), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_it_is_tuned_and_predicts(structure, method):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure, **OPTIONS)
    before = float(la.log_marginal_likelihood())
    la.optimize_prior(method)
    assert float(la.log_marginal_likelihood()) > before
    assert la(case.x).shape == (7, 3) and la.sample(2).shape[0] == 2


def test_the_tuner_takes_it():
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, "classification", 7, **OPTIONS)
    tuner.step(case.batches)
    delta = tuner.hyperparameters()["prior_precision"]
    squares = [
        sum(p.square().sum() for p in case.model.parameters() if (p.ndim > 1) == matrix)
        for matrix in (False, True)
    ]
    output = case.model(case.x)
    expected = torch.nn.functional.cross_entropy(output, case.y)
    expected = expected + (delta[0] * squares[0] + delta[1] * squares[1]) / 14
    torch.testing.assert_close(tuner.loss(output, case.y), expected)


def test_files_ask_for_it(tmp_path):
    la, case = dense.fit("mlp-tanh", **OPTIONS)
    la.save(tmp_path / "posterior.pt")
    with pytest.raises(InvalidValue, match="prior_structure"):
        Laplace.load(tmp_path / "posterior.pt", case.model)
    loaded = Laplace.load(tmp_path / "posterior.pt", case.model, prior_structure=ByKind())
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())


class Wrong(Sharing):
    def __init__(self, index, constant=True):
        self._index, self._constant = index, constant

    @property
    def constant_on_blocks(self):
        return self._constant

    def index(self, layouts):
        return self._index(layouts.groups)


@pytest.mark.parametrize(
    "sharing",
    [
        Wrong(lambda groups: {name: torch.tensor(1) for name in groups}),
        Wrong(lambda groups: {name: torch.tensor(2 * k) for k, name in enumerate(groups)}),
        Wrong(lambda groups: {name: torch.tensor(0.0) for name in groups}),
        Wrong(lambda groups: {}),
        Wrong(lambda groups: None),
        Wrong(lambda groups: [torch.tensor(0) for _ in groups]),
        Wrong(lambda groups: torch.tensor(0)),
        Wrong(lambda groups: {name: None for name in groups}),
        Wrong(lambda groups: dict.fromkeys(groups, 0)),
        Wrong(lambda groups: {name: torch.zeros(1, 3, 1).long() for name in groups}, False),
        Wrong(lambda groups: {name: torch.zeros(1, 1, 1).long() for name in groups}),
        Wrong(lambda groups: {name: torch.zeros(2).long() for name in groups}, False),
    ],
    ids=["from one", "gaps", "floats", "missing", "none", "a list", "a tensor"]
    + ["no tensors", "numbers", "shape", "not constant", "axes"],
)
def test_an_index_that_is_none_is_refused(sharing):
    case = build("mlp-tanh")
    options = {"hessian_structure": "diag", "prior_structure": sharing}
    with pytest.raises(KfacLaplaceError, match="prior_structure 'wrong'"):
        Laplace(case.model, "classification", **options).fit(case.batches)
