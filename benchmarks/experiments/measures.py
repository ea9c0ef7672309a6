"""What is measured of predictions."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from benchmarks.experiments.data import Images
from kfac_laplace import Laplace
from kfac_laplace.demo.data import Split
from kfac_laplace.demo.metrics import accuracy, brier, ece, entropy, nll
from kfac_laplace.posterior.predict.predictive import Predictive

Found = dict[str, float]
AT_ONCE = 250


@torch.no_grad()
def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a network for images (n, 1, s, s), in evaluation mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(AT_ONCE)])


def quality(probs: Tensor, labels: Tensor) -> Found:
    """Accuracy, negative log-likelihood in nats, calibration error and Brier score."""
    probs, labels = probs.cpu(), labels.cpu()
    measures = {"accuracy": accuracy, "nll": nll, "ece": ece, "brier": brier}
    return {name: measure(probs, labels) for name, measure in measures.items()}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that an image of another kind has a higher score than a test image."""
    score = torch.cat([inside, outside]).double().cpu()
    rank = score.unique(return_inverse=True)[1].double()  # torchmetrics takes scores in [0, 1]
    kind = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).int()
    return float(binary_auroc(rank / rank.max().clamp_min(1), kind))


def of_mode(probs: Callable[[Tensor], Tensor], data: Images, few: int) -> Found:
    """Quality on all test images, detection of others by entropy, and quality on the first few.

    Args:
        probs: probabilities of images.
        data: test images and others.
        few: how many the posterior predicts; measures on them begin with "few_".
    """
    found = probs(data.test.x)
    result = quality(found, data.test.y)
    result |= {f"few_{k}": v for k, v in quality(found[:few], data.test.y[:few]).items()}
    inside = entropy(found[:few])
    for name, x in others(data):
        result[f"auroc_{name}"] = auroc(inside, entropy(probs(x)))
    return result


def of_posterior(la: Laplace, data: Images, few: int) -> Found:
    """Quality of `la.predict(x)` as it is by default; names begin with "la_".

    Images of other kinds are told by the posterior's score.
    """
    test = Split(data.test.x[:few], data.test.y[:few])
    probs, inside = predicted(la, test.x)
    result = {f"la_{k}": v for k, v in quality(probs, test.y).items()}
    result["la_entropy"] = float(entropy(probs).mean())
    for name, x in others(data):
        result[f"la_auroc_{name}"] = auroc(inside, predicted(la, x)[1])
    return result


def others(data: Images) -> list[tuple[str, Tensor]]:
    """The sets of images of another kind, by name."""
    sets = (("other", data.other), ("patches", data.patches))
    return [(name, x) for name, x in sets if x is not None]


def predicted(la: Laplace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (n, c), and how strange each image looks to the posterior (n,)."""
    found = [(each.probs, score(each)) for each in map(la.predict, x.split(AT_ONCE))]
    probs, scores = zip(*found, strict=True)
    return torch.cat(probs).float(), torch.cat(scores)


def score(predictive: Predictive) -> Tensor:
    """The library's own score where it has one, else the entropy."""
    if hasattr(Predictive, "ood_score"):
        return predictive.ood_score
    return predictive.entropy
