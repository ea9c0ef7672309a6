"""The ways to predict that are compared, and what each makes of a batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.likelihoods import Latent
from kfac_laplace.likelihoods.predictive import RowPredictive
from kfac_laplace.posterior.calibrate.choice import Choice
from kfac_laplace.posterior.calibrate.held_out import validation_points
from kfac_laplace.posterior.calibrate.temperature import Criterion
from kfac_laplace.posterior.predict.finite import MEAN, finite
from kfac_laplace.posterior.predict.glm import OutputGaussian
from kfac_laplace.report.marginals import marginals
from kfac_laplace.report.means import ClassRows, ValueRows

ENTROPY = "entropy"
#: Scores of strange inputs that are the posterior's: `ood_score`, and two at κ = τ = 1.
OWN_SCORES = ("ood_score", "mutual information", "variance")


@dataclass(frozen=True)
class Way:
    """A way to predict.

    Args:
        name: as it is told.
        kappa: factor on the covariance.
        tau: what divides the outputs.
        link: how probabilities come from the Gaussian.
        is_default: whether it is what `la(x)` does: strange inputs are told by the posterior's
            scores as well, and first by `ood_score`.
        short: its name in pictures.
    """

    name: str
    kappa: float
    tau: float
    link: str
    is_default: bool = False
    short: str = "mode"

    @property
    def scores(self) -> tuple[str, ...]:
        """What strange inputs are told by, the most trusted first."""
        return (*OWN_SCORES, ENTROPY) if self.is_default else (ENTROPY,)

    def latent(self, choice: Choice, outputs: OutputGaussian) -> Latent:
        """The Gaussian over outputs of a batch as this way has it."""
        covariance = self.kappa / self.tau**2 * outputs.covariance
        return Latent(outputs.mean / self.tau, covariance, seed=choice.seed)

    def predicted(self, choice: Choice, outputs: OutputGaussian) -> RowPredictive:
        """A batch as this way predicts it."""
        likelihood = choice.posterior.ggn.likelihood
        return likelihood.predict(self.latent(choice, outputs), sigma_of(choice), self.link)

    def strangeness(self, choice: Choice, outputs: OutputGaussian) -> dict[str, Tensor]:
        """How strange the inputs of a batch are by each of `scores`, (n,)."""
        predicted = self.predicted(choice, outputs)
        found = {ENTROPY: predicted.entropy()}
        if self.is_default:
            latent = Latent(outputs.mean, outputs.covariance, seed=choice.seed)
            likelihood = choice.posterior.ggn.likelihood
            own = likelihood.predict(latent, sigma_of(choice), self.link)
            trace = outputs.covariance.diagonal(dim1=-2, dim2=-1).flatten(1).sum(1)
            score = predicted.strangeness(latent, outputs.head)
            found |= dict(zip(OWN_SCORES, (score, own.information(), trace), strict=True))
        return {name: finite(found[name], name, MEAN).cpu() for name in self.scores}


def ways(choice: Choice, val_loader: Iterable[Any] | None) -> list[Way]:
    """The mode first; temperature scaling where held-out data are known; the posterior.

    Args:
        choice: the posterior with its κ and τ.
        val_loader: held-out data; None: those that chose κ and τ, if some did.
    """
    scaling, likelihood = choice.scaling, choice.posterior.ggn.likelihood
    kappa, tau = float(scaling.scale), float(scaling.temperature)
    link = scaling.auto(likelihood)
    if not likelihood.has_logits:
        return [Way("mode", 0.0, 1.0, link), Way("posterior", kappa, 1.0, link, True, "posterior")]
    found = [Way("mode", 0.0, 1.0, "mode")]
    # Not by its truth value: that of a DataLoader is its length, which not all of them have.
    loader = next(iter(choice.held_out.loaders), None) if val_loader is None else val_loader
    if loader is not None:
        points = validation_points(choice.posterior, loader, choice.key_y, "val_loader")
        cooled = Criterion(likelihood, points, sigma_of(choice), choice.seed).best_temperature()
        name = f"mode, temperature {cooled:.3g}"
        found.append(Way(name, 0.0, cooled, "mode", short="scaled"))
    name = {"mode": "the network's own", "auto": "averages"}.get(link, link)
    found.append(Way(f"posterior, auto ({name})", kappa, tau, link, True, "posterior"))
    name = f"posterior, centred at κ = {kappa:.3g}"
    return [*found, Way(name, kappa, tau, "centred", short="centred")]


def rows(
    way: Way, choice: Choice, outputs: OutputGaussian, y: Tensor, example: Tensor
) -> ClassRows | ValueRows:
    """What a way's predictions of a batch are worth.

    Args:
        way: of predicting.
        choice: the posterior with its κ and τ.
        outputs: the Gaussian over the outputs.
        y: aligned targets.
        example: number of each example among all of the data.
    """
    likelihood, found = choice.posterior.ggn.likelihood, way.predicted(choice, outputs)
    if likelihood.has_logits:
        probs = finite(found.probs, "probabilities", MEAN)
        # An example's number in the place of its probabilities tells whose each row is.
        whose, _ = likelihood.labelled(example.to(probs)[:, None, None].expand_as(probs), y)
        kept, labels = likelihood.labelled(probs, y)
        return ClassRows.of(kept, labels, whose[:, -1].long())
    mean = finite(found.mean, "E[y]", MEAN)
    by_value = None
    if mean.shape == y.shape:
        by_value = marginals(likelihood, found, way.latent(choice, outputs), sigma_of(choice))
    log_prob = finite(found.log_prob(y), "log p(y)", MEAN)
    return ValueRows.of(log_prob, example.to(mean.device), y, mean, by_value)


def sigma_of(choice: Choice) -> Tensor:
    """The noise σ, detached."""
    return choice.posterior.hyperparameters.sigma_noise.detach()


def joined_scores(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Scores of several batches behind one another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
