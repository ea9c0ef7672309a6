"""The demo end to end in small, and its measures against values computed by hand."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
rich_console = pytest.importorskip("rich.console")

from kfac_laplace.demo import metrics  # noqa: E402  # after the checks that they can be imported
from kfac_laplace.demo.classification import Outcome, classification, draw  # noqa: E402
from kfac_laplace.demo.experiment import run  # noqa: E402
from kfac_laplace.demo.methods import METHODS, fixed_map, rehearsed_map  # noqa: E402
from kfac_laplace.demo.models import MicroViT, seeded  # noqa: E402
from kfac_laplace.demo.problem import Problem  # noqa: E402
from kfac_laplace.demo.regression import RegressionOutcome  # noqa: E402
from kfac_laplace.demo.settings import Recipe, Settings  # noqa: E402

TINY = Settings(
    n_train=40,
    n_test=60,
    n_ood=40,
    grid=(1e-3, 1e-1),
    images={name: Recipe(epochs=4, frequency=2) for name in ("cnn", "vit")},
    n_patients=60,
    patients=Recipe(epochs=4, frequency=2),
)
#: training runs where they are more than one
RUNS = {
    "MAP, weight decay by grid": 3,
    "MAP + temperature scaling": 2,
    "post-hoc, held-out data": 2,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run: findings, folder, and what was printed."""
    folder = tmp_path_factory.mktemp("demo")
    console = rich_console.Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    findings = run(TINY, folder, console)
    console.file.close()
    return findings, folder, console.export_text()


@pytest.mark.slow
def test_every_method_on_every_network(finished):
    findings, _, text = finished
    rows = [(row.model, row.method) for row in findings.outcomes]
    assert rows == [(model, method.name) for model in ("cnn", "vit") for method in METHODS]
    for method in METHODS:
        assert text.count(method.name) >= 2
    for row in findings.outcomes:
        assert 0 <= row.accuracy <= 1 and 0 <= row.ece <= 1 and 0 <= row.ood_auroc <= 1
        assert row.nll > 0 and math.isfinite(row.log_evidence)
        assert row.training_runs == RUNS.get(row.method, 1)
        is_posterior = not row.method.startswith("MAP")
        assert (row.ood_score_auroc is not None) == is_posterior
        assert (row.posterior_scale is not None) == is_posterior


@pytest.mark.slow
def test_held_out_images_choose_the_temperature_of_a_network_that_has_not_seen_them(finished):
    """Fitted by hand: the least NLL of held-out logits, taken over by the network of all images."""
    findings, _, _ = finished
    problem = Problem("cnn", draw(TINY, 0), TINY, 0)
    assert torch.equal(torch.cat([problem.held_out.x, problem.kept.x]), problem.data.train.x)
    assert len(problem.held_out.x) == 8
    row = next(row for row in findings.outcomes if row.method == "MAP + temperature scaling")
    fit = rehearsed_map(problem)
    with torch.no_grad():
        logits, test = fit.rehearsal(problem.held_out.x), fit.model(problem.data.test.x)
    grid = torch.logspace(-1, 1, 201)
    losses = [F.cross_entropy(logits / tau, problem.held_out.y) for tau in grid]
    best = grid[torch.stack(losses).argmin()]
    assert row.temperature == pytest.approx(float(best))
    expected = float(F.cross_entropy(test / best, problem.data.test.y))
    assert row.nll == pytest.approx(expected, rel=1e-5)


def test_a_sensible_fixed_precision_is_the_prior_of_its_row():
    """δ = λ N."""
    problem = Problem("cnn", draw(TINY, 0), TINY, 0)
    assert fixed_map(problem).weight_decay * len(problem.data.train.x) == pytest.approx(1.0)


def test_json_holds_the_rows_and_the_history(finished):
    findings, folder, _ = finished
    content = json.loads((folder / "results.json").read_text())
    assert {"settings", "versions", "device", "threads", "seconds"} <= content.keys()
    assert [row["nll"] for row in content["classification"]] == [
        row.nll for row in findings.outcomes
    ]
    assert content["classification"][0].keys() == {field.name for field in fields(Outcome)}
    assert content["regression"][0].keys() == {field.name for field in fields(RegressionOutcome)}
    assert [r["epoch"] for r in content["history"]["cnn: online"]] == [2, 4]


def test_pictures(finished):
    _, folder, _ = finished
    names = {path.name for path in folder.glob("*.png")}
    kinds = ("reliability", "evidence", "precisions", "layers")
    expected = {f"{model}-{kind}.png" for model in ("cnn", "vit") for kind in kinds}
    assert names == expected | {"band.png", "overview.png"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_methods_share_a_seed_and_runs_repeat(finished):
    """Post-hoc rows start from the default MAP, so that they tell as well; runs repeat."""
    findings, _, _ = finished
    by_name = {row.method: row for row in findings.outcomes if row.model == "cnn"}
    assert by_name["post-hoc"].nll == pytest.approx(by_name["MAP, default weight decay"].nll)
    posteriors = {row.log_evidence for name, row in by_name.items() if name.startswith("post-hoc")}
    assert max(posteriors) == pytest.approx(min(posteriors))
    again = next(iter(classification(replace(TINY, models=("cnn",)))))
    assert again.outcome.nll == pytest.approx(by_name["MAP, default weight decay"].nll, rel=1e-5)


PROBS = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
LABELS = torch.tensor([0, 1, 1, 0])


def test_classification_measures_by_hand():
    assert metrics.accuracy(PROBS, LABELS) == 0.75
    expected = -(math.log(0.9) + math.log(0.4) + math.log(0.8) + math.log(0.7)) / 4
    assert metrics.nll(PROBS, LABELS) == pytest.approx(expected, rel=1e-6)
    # four bins with one example each: |1 - .9| + |0 - .6| + |1 - .8| + |1 - .7|, over 4
    assert metrics.ece(PROBS, LABELS) == pytest.approx(1.2 / 4, rel=1e-5)
    assert metrics.brier(PROBS, LABELS) == pytest.approx((0.02 + 0.72 + 0.08 + 0.18) / 4, rel=1e-5)


def test_auroc_counts_pairs_in_the_right_order():
    """Entropies of 0.9, 0.6 against 0.5 and 0.8: three of four pairs are the right way round."""
    inside = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    outside = torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    assert metrics.auroc(metrics.entropy(inside), metrics.entropy(outside)) == pytest.approx(0.75)


def test_regression_measures_by_hand():
    mean, variance = torch.zeros(4), torch.ones(4)
    target = torch.tensor([0.0, 1.0, -2.0, 1.6])
    assert metrics.rmse(mean, target) == pytest.approx(math.sqrt((1 + 4 + 2.56) / 4))
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * (1 + 4 + 2.56) / 4
    assert metrics.gaussian_nll(mean, variance, target) == pytest.approx(expected, rel=1e-6)
    assert metrics.coverage(mean, variance, target) == 0.75  # the interval is ± 1.645


def test_transformer_is_built_the_standard_way():
    """The head reads the class token alone, which sees the patches by attention."""
    model = seeded(MicroViT, 0)
    names = dict(model.named_parameters())
    assert sum(p.numel() for p in names.values()) == 18_218
    assert float(names["position"].detach().std()) == pytest.approx(0.02, rel=0.1)
    assert {"token", "norm.weight", "norm.bias", "blocks.0.norm1.weight"} <= names.keys()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, mirrored = model(x), model(x.flip(-1))
    assert logits.shape == (3, 10)
    assert not torch.allclose(logits, mirrored)  # positions matter
