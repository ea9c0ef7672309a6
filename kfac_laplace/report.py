"""Test data as the mode, temperature scaling and the posterior predict them, side by side."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods import Latent, aligned_target
from kfac_laplace.likelihoods.predictive import RowPredictive
from kfac_laplace.options import check_iterable
from kfac_laplace.posterior.calibrate.choice import Choice
from kfac_laplace.posterior.calibrate.held_out import validation_points
from kfac_laplace.posterior.calibrate.temperature import Criterion
from kfac_laplace.posterior.passes import counted
from kfac_laplace.posterior.predict.glm import OutputGaussian, output_gaussian
from kfac_laplace.posterior.predict.inputs import inputs_alone, inputs_of
from kfac_laplace.posterior.scores import ClassScores, auroc
from kfac_laplace.summary import aligned

#: Probability of the intervals whose coverage is told.
LEVEL = 0.9
HEADINGS = {
    "accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier", "confidence":
    "confidence", "auroc": "OOD AUROC", "rmse": "RMSE", "coverage": "90 % coverage", "sigma": "σ",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Scores by way of predicting; `print` shows a table.

    Args:
        rows: for each way its name under "prediction", and its scores by name.
        n: number of examples.
    """

    rows: list[dict[str, Any]]
    n: int

    def __str__(self) -> str:
        """Aligned columns, one line for each way to predict."""
        names = [name for name in HEADINGS if any(name in row for row in self.rows)]
        lines = [["prediction", *(HEADINGS[name] for name in names)]]
        for row in self.rows:
            numbers = (f"{row[name]:.4f}" if name in row else "–" for name in names)
            lines.append([row["prediction"], *numbers])
        return "\n".join([f"{self.n} examples", *aligned(lines)])

    def write(self, path: str | Path) -> None:
        """Write `rows` and `n` as JSON."""
        content = {"n": self.n, "rows": self.rows}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Way:
    """A way to predict.

    Args:
        name: as it is told.
        kappa: factor on the covariance.
        tau: what divides the outputs.
        link: how probabilities come from the Gaussian.
        scores_strangeness: whether strange inputs are told by `ood_score`, not by the entropy.
    """

    name: str
    kappa: float
    tau: float
    link: str
    scores_strangeness: bool = False


@dataclass(frozen=True)
class Predicted:
    """Outputs of one batch at κ = τ = 1, with aligned targets (none of strange inputs)."""

    outputs: OutputGaussian
    target: Tensor


def compare(
    choice: Choice,
    loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    ood_loader: Iterable[Any] | None = None,
) -> Report:
    """Scores on a loader of the mode, temperature scaling, and the posterior.

    Args:
        choice: the posterior with its κ and τ.
        loader: test data.
        val_loader: held-out data for temperature scaling; by default those that chose κ and τ.
        ood_loader: batches of strange inputs, or of pairs or mappings whose targets do not matter;
            with `batch_fn`, what that takes.

    Raises:
        InvalidValue: a loader without a batch, or test data without a label that counts.
        InvalidType: a loader that is none, or strange inputs of which nothing says what they are.
    """
    given = {"loader": loader, "val_loader": val_loader, "ood_loader": ood_loader}
    for name, value in given.items():
        if name == "loader" or value is not None:
            check_iterable(name, value)
    test = _read("loader", loader, lambda raw: _predicted(choice, raw))
    strange: list[Predicted] = []
    if ood_loader is not None:
        strange = _read("ood_loader", ood_loader, lambda raw: _strange(choice, raw))
    rows = []
    for way in _ways(choice, val_loader):
        found = [_by(way, choice, part) for part in test]
        row = {"prediction": way.name, **_scores(choice, found, test)}
        if strange:
            usual = torch.cat([_strangeness(way, *pair) for pair in zip(found, test, strict=True)])
            others = torch.cat(
                [_strangeness(way, _by(way, choice, part), part) for part in strange]
            )
            row["auroc"] = auroc(usual, others)
        rows.append(row)
    return Report(rows, sum(part.outputs.shape[0] for part in test))


def _read(
    name: str, loader: Iterable[Any], predicted: Callable[[Any], Predicted]
) -> list[Predicted]:
    """All batches of a loader, predicted."""
    found = [predicted(raw) for raw in loader]
    if not found:
        raise InvalidValue(
            "the loader yielded no batch",
            where=name,
            got="0 batches",
            remedy="A generator can be read only once: pass a loader",
        )
    return found


def _ways(choice: Choice, val_loader: Iterable[Any] | None) -> list[Way]:
    """The rows: without logits the mode and the posterior, with their noise."""
    scaling, likelihood = choice.scaling, choice.posterior.ggn.likelihood
    kappa, tau = float(scaling.scale), float(scaling.temperature)
    link = scaling.auto(likelihood)
    if not likelihood.has_logits:
        return [Way("mode", 0.0, 1.0, link), Way("posterior", kappa, 1.0, link, True)]
    ways = [Way("mode", 0.0, 1.0, "mode")]
    # Not by its truth value: that of a DataLoader is its length, which not all of them have.
    loader = next(iter(choice.held_out.loaders), None) if val_loader is None else val_loader
    if loader is not None:
        points = validation_points(choice.posterior, loader, choice.key_y, "val_loader")
        cooled = Criterion(likelihood, points, _sigma(choice), choice.seed).best_temperature()
        ways.append(Way(f"mode, temperature {cooled:.3g}", 0.0, cooled, "mode"))
    name = {"mode": "the network's own", "auto": "averages"}.get(link, link)
    ways.append(Way(f"posterior, auto ({name})", kappa, tau, link, True))
    return [*ways, Way(f"posterior, centred at κ = {kappa:.3g}", kappa, tau, "centred")]


def _predicted(choice: Choice, raw: Any) -> Predicted:
    posterior = choice.posterior
    x, y = split_batch(raw, choice.key_y, posterior.ggn.options.batch_fn)
    outputs = output_gaussian(posterior, counted(posterior, x, y)).double()
    y, axis = y.to(posterior.network.device), posterior.ggn.knowledge.class_axis
    likelihood = posterior.ggn.likelihood
    return Predicted(outputs, aligned_target(likelihood, y, outputs.shape, outputs.mean, axis))


def _strange(choice: Choice, raw: Any) -> Predicted:
    """A batch of strange inputs."""
    x = inputs_alone(raw, choice.posterior.ggn.options.batch_fn, "ood_loader")
    batch = inputs_of(choice.posterior, x, choice.key_y)
    return Predicted(output_gaussian(choice.posterior, batch).double(), torch.empty(0))


def _sigma(choice: Choice) -> Tensor:
    return choice.posterior.hyperparameters.sigma_noise.detach()


def _by(way: Way, choice: Choice, part: Predicted) -> RowPredictive:
    """A batch as a way predicts it."""
    mean = part.outputs.mean / way.tau
    covariance = way.kappa / way.tau**2 * part.outputs.covariance
    latent = Latent(mean, covariance, seed=choice.seed)
    return choice.posterior.ggn.likelihood.predict(latent, _sigma(choice), way.link)


def _strangeness(way: Way, found: RowPredictive, part: Predicted) -> Tensor:
    """What ranks the inputs of a batch, larger for stranger ones."""
    if not way.scores_strangeness:
        return found.entropy()
    outputs = part.outputs
    return found.strangeness(Latent(outputs.mean, outputs.covariance), outputs.head)


def _scores(choice: Choice, found: list[RowPredictive], test: list[Predicted]) -> dict[str, float]:
    """Of one way, over all batches."""
    likelihood = choice.posterior.ggn.likelihood
    pairs = [(one, part.target) for one, part in zip(found, test, strict=True)]
    if likelihood.has_logits:
        parts = [likelihood.labelled(one.probs, y) for one, y in pairs]
        if not any(len(labels) for _, labels in parts):
            raise InvalidValue(
                "no target counts",
                where="target",
                got="labels that are ignored, all of them",
                remedy="Pass data with labels that count",
            )
        return ClassScores.joined([ClassScores.of(*part) for part in parts]).summary()
    rows = sum(y.shape[0] * y.shape[1] for _, y in pairs)
    scores = {"nll": -sum(float(one.log_prob(y).sum()) for one, y in pairs) / rows}
    if all(one.mean.shape == y.shape for one, y in pairs):
        errors = torch.cat([(one.mean - y).flatten() for one, y in pairs])
        scores["rmse"] = float(errors.square().mean().sqrt())
    if likelihood.has_gaussian_noise:
        inside = torch.cat([_inside(one, y).flatten() for one, y in pairs])
        scores |= {"coverage": float(inside.double().mean()), "sigma": float(_sigma(choice))}
    return scores


def _inside(predictive: RowPredictive, y: Tensor) -> Tensor:
    """Whether targets lie in the central intervals of a Gaussian predictive."""
    normal = predictive.distribution(lambda aligned: aligned)
    width = math.sqrt(2) * torch.erfinv(torch.tensor(LEVEL, dtype=torch.float64))
    return (normal.mean - y.reshape(normal.mean.shape)).abs() <= width * normal.variance.sqrt()
