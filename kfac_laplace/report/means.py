"""Figures that are means over rows: proper scores, errors, the shares inside intervals.

Examples are what is resampled, and may have several rows: tokens, pixels, outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.report.marginals import Marginals
from kfac_laplace.report.ranks import risk_over_coverage

#: Bins of equal width of the expected calibration error.
BINS = 15

#: What an ECE would be if nothing but chance parted accuracy and confidence.
CHANCE = "ece by chance"

#: Probabilities of the intervals whose coverage is told.
LEVELS = (0.5, 0.9, 0.95)


@dataclass(frozen=True)
class ClassRows:
    """What predictions of classes are worth, each (rows,).

    Args:
        example: number of the example of each row.
        log_prob: log p of the label.
        confidence: p of the most probable class.
        correct: whether that is the label, 1 or 0.
        brier: squared distance to the one-hot label, over the classes.
    """

    example: Tensor
    log_prob: Tensor
    confidence: Tensor
    correct: Tensor
    brier: Tensor

    @classmethod
    def of(cls, probs: Tensor, labels: Tensor, example: Tensor | None = None) -> "ClassRows":
        """Of probabilities (rows, c) and labels (rows,), by default of an example each."""
        probs, labels = probs.double(), labels.long()
        tiny = torch.finfo(probs.dtype).tiny
        onehot = torch.nn.functional.one_hot(labels, probs.shape[-1])
        confidence, said = probs.max(-1)
        found = (
            torch.arange(len(labels), device="cpu") if example is None else example,
            probs.gather(-1, labels[:, None])[:, 0].clamp_min(tiny).log(),
            confidence,
            (said == labels).double(),
            (probs - onehot).square().sum(-1),
        )
        return cls(*(one.cpu() for one in found))

    @cached_property
    def bins(self) -> Tensor:
        """Bin of each row's confidence."""
        return (self.confidence * BINS).ceil().long().clamp(1, BINS) - 1

    @cached_property
    def sums(self) -> Tensor:
        """Number of rows, the four scores, and correct − confidence by bin, (n, 5 + bins)."""
        columns = self.confidence.new_zeros(len(self.example), 5 + BINS)
        scores = (torch.ones_like(self.confidence), self.correct, self.log_prob, self.brier)
        columns[:, :5] = torch.stack([*scores, self.confidence], 1)
        columns.scatter_(1, 5 + self.bins[:, None], (self.correct - self.confidence)[:, None])
        return by_example(columns, self.example)

    def figures(self, weights: Tensor) -> dict[str, Tensor]:
        """Accuracy, mean NLL in nats, ECE, Brier score, AURC and mean confidence.

        Beside the ECE stands what chance alone would make of it: the bins' gaps less those of all
        data, under `CHANCE`.

        Args:
            weights: of the examples, (b, n), where examples without a row may be left out.
        """
        totals = weights[:, : len(self.sums)] @ self.sums
        count = totals[:, 0]
        gaps = totals[:, 5:] / count[:, None]
        expected = self.sums[:, 5:].sum(0) / len(self.example)
        return {
            "accuracy": totals[:, 1] / count,
            "nll": -totals[:, 2] / count,
            "ece": gaps.abs().sum(1),
            CHANCE: (gaps - expected).abs().sum(1),
            "brier": totals[:, 3] / count,
            "aurc": risk_over_coverage(self.confidence, 1 - self.correct, weights[:, self.example]),
            "confidence": totals[:, 4] / count,
        }


@dataclass(frozen=True)
class ValueRows:
    """What predictions of values are worth.

    Args:
        example: number of the example of each row (rows,).
        log_prob: log p of the target or targets of each row (rows,).
        values: of each number that was predicted, (rows, c, k): squared error, CRPS, the width of
            the 90 % interval, whether the target is inside that of each level; k = 0 where
            targets are no such numbers.
        ranks: where each target lies in its predictive distribution, in [0, 1], (rows, c).
    """

    example: Tensor
    log_prob: Tensor
    values: Tensor
    ranks: Tensor

    @classmethod
    def of(
        cls, log_prob: Tensor, example: Tensor, y: Tensor, mean: Tensor, by_value: Marginals | None
    ) -> "ValueRows":
        """Of aligned targets y and means (n, t, c), and log p (n, t) or (n, t, c) of them.

        Args:
            log_prob: of the targets.
            example: number of each of the n examples.
            y: targets.
            mean: E[y].
            by_value: the distribution of each target; None where it is not told.
        """
        rows = example[:, None].expand(log_prob.shape[:2]).flatten()
        log_prob = log_prob.reshape(len(rows), -1).sum(1)
        if by_value is None:
            return cls(rows.cpu(), log_prob.cpu(), log_prob.new_zeros(len(rows), 1, 0).cpu(),
                       log_prob.new_zeros(len(rows), 0).cpu())  # fmt: skip
        low, high = by_value.interval(0.9)
        columns = [(mean - y).square(), by_value.crps(y), high - low]
        for level in LEVELS:
            low, high = by_value.interval(level)
            columns.append(((low <= y) & (y <= high)).double())
        values = torch.stack(columns, -1).flatten(0, 1)
        return cls(rows.cpu(), log_prob.cpu(), values.cpu(), by_value.rank(y).flatten(0, 1).cpu())

    @cached_property
    def sums(self) -> Tensor:
        """Number of rows, log p, number of values and their columns, by example."""
        ones = torch.ones_like(self.log_prob)
        each = ones * self.values.shape[1]
        columns = torch.stack([ones, self.log_prob, each], 1)
        return by_example(torch.cat([columns, self.values.sum(1)], 1), self.example)

    def figures(self, weights: Tensor) -> dict[str, Tensor]:
        """NLL, and of numbers RMSE, CRPS, coverages and the mean width of 90 % intervals."""
        totals = weights @ self.sums
        found = {"nll": -totals[:, 1] / totals[:, 0]}
        if self.values.shape[2]:
            squares, crps, width, *inside = (totals[:, 3:] / totals[:, 2:3]).unbind(1)
            found |= {"rmse": squares.sqrt(), "crps": crps}
            found |= {f"coverage_{100 * at:.0f}": of for at, of in zip(LEVELS, inside, strict=True)}
            found["sharpness"] = width
        return found


def by_example(columns: Tensor, example: Tensor) -> Tensor:
    """Sums of rows (rows, k) by example, (n, k)."""
    n = int(example.max()) + 1 if len(example) else 0
    return columns.new_zeros(n, columns.shape[1]).index_add_(0, example, columns)


def joined_classes(parts: Sequence[ClassRows]) -> ClassRows:
    """Of several batches."""
    names = ("example", "log_prob", "confidence", "correct", "brier")
    return ClassRows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def joined_values(parts: Sequence[ValueRows]) -> ValueRows:
    """Of several batches."""
    names = ("example", "log_prob", "values", "ranks")
    return ValueRows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
