"""What a record tells of the evidence: γ, and what a constant prediction would have."""

import logging

import pytest
import torch
import torch.nn.functional as F
from marglik.small_networks import made, rows
from torch import nn

from kfac_laplace import MarglikTuner


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_records_tell_what_the_data_determine(structure):
    """γ by group: Σ (1 − δ [P⁻¹]_ii), and the log-likelihood of the class frequencies."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x, y = rows()
    tuner = MarglikTuner(model, "classification", 20, hessian_structure=structure)
    record = tuner.step([(x, y)])
    la = tuner.laplace([(x, y)])
    frequencies = y.bincount(minlength=3).double() / 20
    expected = (y.bincount(minlength=3) * frequencies.log()).nansum()
    assert record.constant_evidence == pytest.approx(float(expected), rel=1e-12)
    found = []
    for name, delta in zip(record.groups, la.prior_precision, strict=True):
        if structure == "full":
            break
        h = la.curvature.blocks[name].dense()
        found.append(
            len(h) - delta * torch.linalg.inv(h + delta * torch.eye(len(h)).double()).trace()
        )
    if structure == "full":
        h = la.curvature.blocks["full"].dense()
        deltas = la.prior_precision.repeat_interleave(torch.tensor([25, 18]))
        variances = torch.linalg.inv(h + deltas.diag()).diagonal()
        found = [part.sum() for part in (1 - deltas * variances).split([25, 18])]
    torch.testing.assert_close(record.effective_dimensions, torch.stack(found), rtol=1e-9, atol=0)


def test_an_evidence_below_that_of_a_constant_is_said_once(caplog):
    """Hardly any data, so that the volume of the prior costs more than they give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3)).double()
    x, y = rows(6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    tuner = MarglikTuner(model, "classification", 6, n_hypersteps=1, lr_hyp=1e-3)
    with caplog.at_level(logging.WARNING, "kfac_laplace"):
        records = [tuner.step([(x, y)]) for _ in range(14)]
    assert records[-1].log_likelihood > records[-1].constant_evidence > records[-1].evidence
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "below that of a constant" in text]) == 1
