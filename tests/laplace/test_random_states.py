"""Whatever reads data leaves torch's random state as it found it: each DataLoader draws a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Laplace
from kfac_laplace.subnetworks import LastLayerSubnetMask

Reads = Callable[[Laplace, DataLoader[Any], DataLoader[Any]], object]
READERS: dict[str, Reads] = {
    "fit": lambda la, train, held: la.fit(train),
    "fit, held-out data": lambda la, train, held: la.fit(train, val_loader=held),
    "calibrate": lambda la, train, held: la.calibrate(held),
    "calibrate, loo": lambda la, train, held: la.calibrate(train, "loo"),
    "grid": lambda la, train, held: la.optimize_prior("gridsearch", val_loader=held, grid=[1, 2]),
    "exact": lambda la, train, held: la.evidence("exact", loader=train),
    "columns": lambda la, train, held: la.evidence("columns", loader=train),
    "predict_loader": lambda la, train, held: la.predict_loader(held),
    "report": lambda la, train, held: la.report(held, resamples=0, ood_loader=held),
    "plan": lambda la, train, held: la.plan(train),
    "last layer": lambda la, train, held: LastLayerSubnetMask(la.model).select(train),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_data_leave_the_random_state(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [TensorDataset(torch.randn(n, 3), torch.randint(0, 3, (n,))) for n in (20, 12)]
    train, held = (DataLoader(each, 5, shuffle=True) for each in data)
    la = Laplace(model).fit(train)
    before = torch.get_rng_state()
    READERS[name](la, train, held)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_grid_search_reads_its_data_once():
    """Of a loader that shuffles or augments, all candidates are scored on the same batches."""
    reads = 0

    class Counted:
        def __iter__(self):
            nonlocal reads
            reads += 1
            return iter([(torch.randn(6, 3), torch.randint(0, 3, (6,)))])

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    la = Laplace(model).fit([(torch.randn(9, 3), torch.randint(0, 3, (9,)))])
    la.optimize_prior("gridsearch", val_loader=Counted(), grid=[0.1, 1.0, 10.0])
    assert reads == 1
