"""What reports compute, on lines whose answer is known."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from experiments.made_up import write_cifar, write_mnist, write_uci
from torch.nn.utils import parameters_to_vector

from benchmarks.experiments.experiment import Place
from benchmarks.experiments.fixup import WideResNet
from benchmarks.experiments.lines import Line
from benchmarks.experiments.problem import Problem
from benchmarks.experiments.regression import Task
from benchmarks.experiments.rotation import ROTATION, top
from benchmarks.experiments.selection import SELECTION, correlations
from benchmarks.experiments.settings import Counts
from benchmarks.experiments.wrn import WRN, Size


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


@pytest.mark.parametrize("name", ["cnn", "batch-norm", "vit", "mlp"])
def test_images_start_at_the_weights_of_their_seed(name):
    """Whatever was drawn before; a generator's state is left as it was."""
    problem = Problem(name, "digits", 20, False, 3, 1, Counts(10, 5), "cpu", None)
    first = parameters_to_vector(problem.model().parameters())
    state = torch.get_rng_state()
    second = parameters_to_vector(problem.model().parameters())
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, parameters_to_vector(problem.model(1).parameters()))


def test_regression_starts_at_the_weights_of_its_split(tmp_path):
    write_uci(tmp_path)
    tasks = [Task("yacht", split, 1, "cpu", tmp_path) for split in (0, 0, 1)]
    weights = [parameters_to_vector(task.model().parameters()) for task in tasks]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("experiment", [WRN, SELECTION, ROTATION], ids=lambda each: each.name)
def test_cells_come_out_the_same_again(experiment, tmp_path):
    write_cifar(tmp_path)
    write_mnist(tmp_path)
    size = {"size": 20, "seed": 1, "epochs": 2, "test": 10}
    cells = {
        "wrn": Size(1, 20, 4, 2, 10, 10, 2).__dict__ | {"augment": True, "method": "sgd"},
        "selection": {"network": "cnn", "depth": 2, "width": 4, "method": "tuned"},
        "rotation": {"true": 30, "alpha": 60},
    }
    cell = size | cells[experiment.name]
    found = [experiment.run(cell, Place("cpu", tmp_path))["nll"] for _ in range(2)]
    assert found[0] == found[1]


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
