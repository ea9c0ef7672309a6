"""The regression half: how much to trust a prediction of disease progression."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_laplace import Laplace
from kfac_laplace.demo import metrics
from kfac_laplace.demo.data import BMI, Patients, Split, diabetes
from kfac_laplace.demo.models import mlp, seeded
from kfac_laplace.demo.settings import Settings
from kfac_laplace.demo.timing import Stopwatch
from kfac_laplace.demo.training import Fit, train_online, train_plain


@dataclass(frozen=True)
class RegressionOutcome:
    """One row of the regression table; targets are standardised.

    Attributes:
        method: name of the method.
        seed: seed of split, initial weights and batch order.
        rmse: root mean squared error on the test patients.
        nll: mean negative log predictive density, noise included, in nats.
        coverage: share of test patients inside the central 90 % interval.
        sigma: standard deviation of the observation noise.
        log_evidence: log marginal likelihood, in nats; None for the point estimate.
        seconds: training and posterior.
    """

    method: str
    seed: int
    rmse: float
    nll: float
    coverage: float
    sigma: float
    log_evidence: float | None
    seconds: float


@dataclass(frozen=True)
class Band:
    """A predictive band over one feature, in the data's own units; all shapes (n,).

    Attributes:
        x: where the band is drawn.
        mean: predictive mean.
        epistemic: standard deviation of the network's output.
        total: standard deviation with the observation noise.
        seen_x: body-mass index of the training patients.
        seen_y: their disease progression.
    """

    x: Tensor
    mean: Tensor
    epistemic: Tensor
    total: Tensor
    seen_x: Tensor
    seen_y: Tensor


def regression(settings: Settings) -> Iterator[RegressionOutcome]:
    """Run the half, yielding each row as soon as it is there."""
    for seed in range(settings.seed, settings.seed + settings.seeds):
        data = diabetes(settings.n_patients, seed, settings.device)
        weight_decay = settings.patients.weight_decay
        fit = plain(settings, data.train, seed, weight_decay)
        yield point_estimate("MAP, default weight decay", fit, data.train, data, seed)
        # The loss is the mean of squares, not of halved ones: δ = λ N/2 at a noise of 1.
        fixed = plain(settings, data.train, seed, 2 * settings.fixed_precision / len(data.train.x))
        yield point_estimate("MAP, δ = 1", fixed, data.train, data, seed)
        yield noise_held_out(settings, data, seed)
        clock = Stopwatch(data.train.x)
        la = Laplace(fit.model, "regression").fit(whole(data.train)).optimize_prior()
        yield posterior("post-hoc", la, data, seed, fit.seconds + clock())
        tuned = online(settings, data.train, seed)
        clock = Stopwatch(data.train.x)
        assert tuned.tuner is not None
        la = tuned.tuner.laplace(whole(data.train))
        yield posterior("online", la, data, seed, tuned.seconds + clock())
        la.calibrate()
        yield posterior("online, leave-one-out", la, data, seed, tuned.seconds + clock())


def plain(settings: Settings, train: Split, seed: int, weight_decay: float) -> Fit:
    """Squared error with a fixed weight decay."""
    model = seeded(lambda: mlp(train.x.shape[1]), seed, settings.device)
    return train_plain(
        model, train, F.mse_loss, settings.patients, seed=seed, weight_decay=weight_decay
    )


def online(settings: Settings, train: Split, seed: int) -> Fit:
    """Precisions and noise tuned while training."""
    model = seeded(lambda: mlp(train.x.shape[1]), seed, settings.device)
    return train_online(model, train, "regression", settings.patients, seed=seed)


def noise_held_out(settings: Settings, data: Patients, seed: int) -> RegressionOutcome:
    """The default weight decay with the noise of held-out training patients, then fitted to all."""
    weight_decay = settings.patients.weight_decay
    held_out, kept = data.train.cut(round(settings.holdout * len(data.train.x)))
    rehearsal = plain(settings, kept, seed, weight_decay)
    fit = plain(settings, data.train, seed, weight_decay)
    fit = replace(fit, seconds=rehearsal.seconds + fit.seconds, rehearsal=rehearsal.model)
    return point_estimate("MAP, noise by held-out data", fit, held_out, data, seed)


def point_estimate(
    name: str, fit: Fit, residuals_on: Split, data: Patients, seed: int
) -> RegressionOutcome:
    """The network's output; its noise is what it, or its rehearsal, leaves unexplained there."""
    with torch.no_grad():
        explained = (fit.rehearsal or fit.model)(residuals_on.x)
        mean = fit.model(data.test.x)
    variance = (explained - residuals_on.y).square().mean()
    return scored(
        name, seed, data.test, mean, variance.expand_as(mean), float(variance.sqrt()), None,
        fit.seconds,
    )  # fmt: skip


def posterior(
    name: str, la: Laplace, data: Patients, seed: int, seconds: float
) -> RegressionOutcome:
    """The linearised predictive with its noise."""
    predictive = la.predict(data.test.x)
    sigma = float(la.sigma_noise)
    variance = predictive.covariance[:, :, 0] + sigma**2
    evidence = float(la.log_marginal_likelihood())
    return scored(name, seed, data.test, predictive.mean, variance, sigma, evidence, seconds)


def scored(
    name: str,
    seed: int,
    test: Split,
    mean: Tensor,
    variance: Tensor,
    sigma: float,
    log_evidence: float | None,
    seconds: float,
) -> RegressionOutcome:
    """A row from predictive means and variances (n, 1)."""
    return RegressionOutcome(
        method=name,
        seed=seed,
        rmse=metrics.rmse(mean, test.y),
        nll=metrics.gaussian_nll(mean, variance, test.y),
        coverage=metrics.coverage(mean, variance, test.y),
        sigma=sigma,
        log_evidence=log_evidence,
        seconds=seconds,
    )


def bmi_band(settings: Settings) -> Band:
    """Progression against body-mass index alone, with a tuned network's bands."""
    data = diabetes(settings.n_patients, settings.seed, settings.device)
    train = Split(data.train.x[:, BMI : BMI + 1], data.train.y)
    fit = online(settings, train, settings.seed)
    assert fit.tuner is not None
    la = fit.tuner.laplace(whole(train))
    # Beyond the data on both sides, where the band should widen.
    x = torch.linspace(-4, 6, 200, device=train.x.device)[:, None]
    predictive = la.predict(x)
    x_mean, x_std = data.x_scale.mean[BMI], data.x_scale.std[BMI]
    y_mean, y_std = data.y_scale
    epistemic = predictive.covariance[:, 0, 0].cpu()
    return Band(
        x=x[:, 0].cpu() * x_std + x_mean,
        mean=predictive.mean[:, 0].cpu() * y_std + y_mean,
        epistemic=epistemic.sqrt() * y_std,
        total=(epistemic + float(la.sigma_noise) ** 2).sqrt() * y_std,
        seen_x=train.x[:, 0].cpu() * x_std + x_mean,
        seen_y=train.y[:, 0].cpu() * y_std + y_mean,
    )


def whole(split: Split) -> list[tuple[Tensor, Tensor]]:
    """All examples as one batch."""
    return [(split.x, split.y)]
