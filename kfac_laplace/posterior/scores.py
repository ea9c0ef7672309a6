"""Scores of predictions, by row and then on average: proper ones, calibration, ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

#: Bins of equal width of the expected calibration error.
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """What single predictions of classes are worth, each (rows,).

    Args:
        log_prob: log p of the label.
        confidence: p of the most probable class.
        correct: whether that is the label, 1 or 0.
        brier: squared distance to the one-hot label, over the classes.
    """

    log_prob: Tensor
    confidence: Tensor
    correct: Tensor
    brier: Tensor

    @classmethod
    def of(cls, probs: Tensor, labels: Tensor) -> "ClassScores":
        """Of probabilities (rows, c) and labels (rows,)."""
        probs = probs.double()
        tiny = torch.finfo(probs.dtype).tiny
        onehot = torch.nn.functional.one_hot(labels, probs.shape[-1])
        confidence, said = probs.max(-1)
        return cls(
            probs.gather(-1, labels[:, None])[:, 0].clamp_min(tiny).log(),
            confidence,
            (said == labels).double(),
            (probs - onehot).square().sum(-1),
        )

    @classmethod
    def joined(cls, parts: list["ClassScores"]) -> "ClassScores":
        """Of several batches."""
        names = ("log_prob", "confidence", "correct", "brier")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def summary(self) -> dict[str, float]:
        """Accuracy, mean NLL in nats, ECE, Brier score and mean confidence."""
        return {
            "accuracy": float(self.correct.mean()),
            "nll": -float(self.log_prob.mean()),
            "ece": self.calibration_error(),
            "brier": float(self.brier.mean()),
            "confidence": float(self.confidence.mean()),
        }

    def calibration_error(self) -> float:
        """Mean |accuracy − confidence| over bins of the confidence, by their numbers of rows."""
        which = (self.confidence * BINS).ceil().long().clamp(1, BINS) - 1
        gaps = (self.correct - self.confidence).new_zeros(BINS)
        gaps.index_add_(0, which, self.correct - self.confidence)
        return float(gaps.abs().sum() / len(self.confidence))


def auroc(usual: Tensor, strange: Tensor) -> float:
    """Chance that a score (m,) of the strange is above one (n,) of the usual; ties count half."""
    scores = torch.cat([usual, strange]).double()
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[place]  # mean rank of equal scores
    m, n = len(strange), len(usual)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (m * n))
