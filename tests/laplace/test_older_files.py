"""Files that an earlier release wrote, of a network of 26 parameters fitted to 16 examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace

DATA = Path(__file__).parent / "data"
#: What the release itself gave for the evidence.
EVIDENCE = {"posterior-0.3.0.safetensors": -14.9031, "posterior-0.3.0-ekfac.pt": -15.3501}


@pytest.mark.parametrize("name", EVIDENCE)
def test_files_of_a_release_are_read(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    la = Laplace.load(DATA / name, model, weights="ignore")
    assert float(la.log_marginal_likelihood()) == pytest.approx(EVIDENCE[name], abs=1e-4)
    assert la.predict(torch.randn(5, 3)).mean.sum(-1).allclose(torch.ones(5))


def test_what_is_of_a_run_is_in_no_file():
    model = nn.Sequential(nn.Linear(3, 2))
    la = Laplace(model, "classification", offload="cpu")
    la.fit([(torch.randn(4, 3), torch.arange(4) % 2)])
    assert {"offload", "process_group"}.isdisjoint(la.state_dict()["options"])
