"""Quality of predictions: torchmetrics where it has the measure, one line of torch elsewhere."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

ECE_BINS = 15


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class (n, c) is the label (n,)."""
    return float((probs.argmax(1) == labels).float().mean())


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean negative log probability of the labels, in nats."""
    tiny = torch.finfo(probs.dtype).tiny  # a label of probability zero costs 87 nats, not infinity
    return float(-probs.clamp_min(tiny).log().gather(1, labels[:, None]).mean())


def ece(probs: Tensor, labels: Tensor) -> float:
    """Expected calibration error: |accuracy - confidence|, a weighted mean over 15 bins."""
    error = multiclass_calibration_error(
        probs, labels, num_classes=probs.shape[1], n_bins=ECE_BINS, norm="l1"
    )
    return float(error)


def brier(probs: Tensor, labels: Tensor) -> float:
    """Squared distance of the probabilities to the one-hot label, over classes; in [0, 2]."""
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    return float((probs - one_hot).square().sum(1).mean())


def entropy(probs: Tensor) -> Tensor:
    """Predictive entropy (n,) in nats: the score that should be high off the distribution."""
    return -torch.special.xlogy(probs, probs).sum(1)


def auroc(score: Tensor, ood_score: Tensor) -> float:
    """Chance that an out-of-distribution input has a higher score than a test input."""
    scores = torch.cat([score, ood_score])
    is_ood = torch.cat([torch.zeros(len(score)), torch.ones(len(ood_score))]).int()
    # torchmetrics squashes scores outside [0, 1] by a sigmoid: map them there by hand, exactly.
    return float(binary_auroc(scores / scores.max(), is_ood.to(scores.device)))


def rmse(mean: Tensor, target: Tensor) -> float:
    """Root mean squared error."""
    return float((mean - target).square().mean().sqrt())


def gaussian_nll(mean: Tensor, variance: Tensor, target: Tensor) -> float:
    """Mean negative log density of the targets under N(mean, variance), in nats."""
    normal = torch.distributions.Normal(mean, variance.sqrt())
    return float(-normal.log_prob(target).mean())


def coverage(mean: Tensor, variance: Tensor, target: Tensor, level: float = 0.9) -> float:
    """Share of targets inside the central interval of N(mean, variance) of probability `level`."""
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)).item()
    return float(((mean - target).abs() <= quantile * variance.sqrt()).float().mean())
