"""Predictives over loaders are those of all inputs at once."""

import pytest
import torch
from posterior import dense
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue

WAYS = [{"link_approx": link} for link in ("auto", "mode", "probit", "centred", "bridge", "mc")] + [
    {"pred_type": "linear"},
    {"pred_type": "nn"},
]
# float64 products of the same numbers in batches of other sizes.
TOL = {"rtol": 1e-10, "atol": 1e-12}


def numbers(predictive):
    found = {"mean": predictive.mean, "covariance": predictive.covariance}
    for name in ("entropy", "epistemic", "aleatoric", "shape"):
        found[name] = getattr(predictive, name)
    if predictive.outputs is not None:
        found["ood_score"] = predictive.ood_score
    return found


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression"])
def test_equal_to_all_at_once(name, way, seeded):
    la, case = dense.fit(name)
    la.posterior_scale = 2.0  # "auto" takes points
    one, other = (torch.Generator().manual_seed(3) if seeded else None for _ in range(2))
    found = la.predict_loader(case.batches, n_samples=5, generator=one, **way)
    want = la.predict(case.x, n_samples=5, generator=other, **way)
    torch.testing.assert_close(numbers(found), numbers(want), **TOL)
    if seeded:
        assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("name", ["cnn", "mlp-binary", "tokens"])
def test_other_shapes(name):
    la, case = dense.fit(name)
    found, want = la.predict_loader(case.batches), la.predict(case.x)
    torch.testing.assert_close(numbers(found), numbers(want), **TOL)


def test_what_a_loader_may_yield():
    la, case = dense.fit("mlp-tanh")
    want = la.predict(case.x).probs
    state = torch.random.get_rng_state()
    with_targets = DataLoader(TensorDataset(case.x, case.y), batch_size=3)
    without = DataLoader(TensorDataset(case.x), batch_size=4)
    for loader in (with_targets, without, case.x.split(2), (x for x in case.x.split(5))):
        torch.testing.assert_close(la.predict_loader(loader).probs, want, **TOL)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mappings():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, a, b):
            return self.layer(a + b)

    torch.manual_seed(0)
    a, b, y = torch.randn(7, 2).double(), torch.randn(7, 2).double(), torch.arange(7) % 3
    rows = [{"a": a[k : k + 3], "b": b[k : k + 3], "labels": y[k : k + 3]} for k in (0, 3, 6)]
    la = Laplace(Named().double(), "classification").fit(rows)
    want = la.predict({"a": a, "b": b})
    bare = [{"a": row["a"], "b": row["b"]} for row in rows]
    for loader in (rows, bare):
        torch.testing.assert_close(numbers(la.predict_loader(loader)), numbers(want), **TOL)


def test_refusals():
    la, case = dense.fit("mlp-tanh")
    with pytest.raises(InvalidValue, match="no batch"):
        la.predict_loader([])
    with pytest.raises(InvalidType, match="inputs alone, a pair"):
        la.predict_loader([(case.x, case.x, case.x)])
    with pytest.raises(InvalidValue, match="pred_type"):
        la.predict_loader(case.batches, "network")
    with pytest.raises(InvalidType):
        la.predict_loader(3)


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_sequences_of_other_lengths_are_refused(pred_type):
    la, case = dense.fit("tokens")
    x = case.x
    with pytest.raises(InvalidValue, match="differ in shape"):
        la.predict_loader([x[:3], x[3:, :-1]], pred_type)
