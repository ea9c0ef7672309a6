"""What reports compute, on lines whose answer is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from benchmarks.experiments.fixup import WideResNet
from benchmarks.experiments.lines import Line
from benchmarks.experiments.rotation import top
from benchmarks.experiments.selection import correlations


def test_the_top_of_a_parabola_is_found_from_three_points():
    points = [(x, 5 - 0.3 * (x - 52.0) ** 2) for x in (15, 30, 45, 60, 75)]
    assert top(points[::-1]) == pytest.approx(52.0)
    assert top(points[:2]) == 30  # an edge


def test_correlations_rank_by_evidence():
    """Evidence rises as the loss falls within each seed, against it between seeds."""
    lines = [
        Line({"depth": d, "width": 1, "seed": s}, {"evidence": d + 10 * s, "nll": 5 * s - d})
        for d in range(3)
        for s in range(2)
    ]
    whole, within, averages = correlations(lines, "evidence")
    assert (within, averages) == ("+1.00, +1.00", "+1.00")
    # ranks of evidence 0..5 against those of −nll: 3, 4, 5, 0, 1, 2
    assert whole == f"{1 - 6 * 6 * 9 / (6 * 35):+.2f}"


def test_fixup_starts_at_its_shortcuts():
    """Residual branches add nothing at the start, and the head gives zeros."""
    model = WideResNet(1)
    x = torch.randn(2, 3, 16, 16)
    assert model(x).abs().max() == 0
    block, z = model.blocks[1], torch.randn(2, 16, 16, 16)
    assert torch.equal(block(z), z)
    count = sum(parameter.numel() for parameter in WideResNet(4).parameters())
    assert count == pytest.approx(2.75e6, rel=0.005)
    assert len(model.scalars()) == 6 * 6 + 1
