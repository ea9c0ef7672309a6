"""Classification: a softmax over integer labels, with the options of torch's cross-entropy."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution

from kfac_laplace.devices import sent
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.likelihoods.activations import last_activation, softmax_rows
from kfac_laplace.likelihoods.axes import ambiguous, without
from kfac_laplace.likelihoods.checks import check_length, loss_weight
from kfac_laplace.likelihoods.latent import Latent
from kfac_laplace.likelihoods.likelihood import Likelihood
from kfac_laplace.likelihoods.links import averaged, bridge, centred, probit
from kfac_laplace.likelihoods.predictive import ClassPredictive, RowPredictive
from kfac_laplace.likelihoods.stick_breaking import StickBreaking


class Categorical(Likelihood):
    """Softmax likelihood of integer labels: Λ = diag(p) − p pᵀ, of rank C − 1.

    The loss is that of `torch.nn.functional.cross_entropy` with reduction="sum":
    −Σ_c q_c log p_c with q = (1 − ε) w_y onehot(y) + ε/C w, and q = 0 for ignored labels. The
    curvature of a row is m(y) Λ with m = Σ_c q_c. With weights or smoothing the loss's exponential
    is no normalised density; the evidence takes the loss as it stands.

    Args:
        ignore_index: label of rows that do not count; it need not be a class.
        weight: w ≥ 0, one for each class, shape (C,).
        label_smoothing: ε in [0, 1].

    Raises:
        InvalidValue: an option out of range.
        InvalidType: an option of the wrong type.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ):
        if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
            raise InvalidType("not an integer", where="ignore_index", got=repr(ignore_index))
        if not isinstance(label_smoothing, int | float):
            raise InvalidType("not a number", where="label_smoothing", got=repr(label_smoothing))
        if not 0 <= label_smoothing <= 1:
            raise InvalidValue("must lie in [0, 1]", where="label_smoothing", got=label_smoothing)
        self.ignore_index = ignore_index
        self.weight = None if weight is None else loss_weight(weight, "weight")
        self.label_smoothing = float(label_smoothing)

    has_logits = True

    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """Labels of probabilities softmax(f), without weights and smoothing."""
        return CategoricalDistribution(logits=f)

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis where `output.shape[:-1] == target.shape`, else axis 1.

        Raises:
            InvalidValue: neither, or both: there are as many positions as classes.
        """
        shape, labels = output.shape, target.shape
        last = shape[:-1] == labels
        second = len(shape) > 1 and labels == (shape[0], *shape[2:])
        if last and second and len(shape) > 2 and max(shape[1:]) > 1:
            raise ambiguous(shape, labels)
        if not last and not second:
            raise InvalidValue(
                "labels do not match the output",
                where="target",
                got=f"{tuple(labels)} for an output {tuple(shape)}",
                remedy="Labels have the output's shape without its class axis, last or second",
            )
        return -1 if last else 1

    def likely_axis(self, shape: Sequence[int]) -> int:
        """The second of four axes and more, as images have it; the last of three, as tokens do."""
        return 1 if len(shape) > 3 else -1

    def axes_of_gradient(self, gradient: Tensor) -> tuple[int, ...] | None:
        """Those along which it sums to zero, as a softmax does not see shifts."""
        entries = gradient.double()
        total = float(entries.abs().sum())
        if not 0 < total < math.inf:
            return None
        off = [float(entries.sum(axis).abs().sum()) / total for axis in range(1, gradient.ndim)]
        # Half the digits of bfloat16, in which the loss may have been computed.
        return tuple(axis for axis, one in enumerate(off, 1) if one < 0.05)

    def check_axis(self, shape: Sequence[int], target: Tensor, axis: int) -> None:
        """Labels have the output's shape without its class axis."""
        if not shape or target.shape != without(shape, axis if len(shape) > 2 else -1):
            raise InvalidValue(
                "labels do not match the output, whose classes lie along another axis",
                where="target",
                got=f"{tuple(target.shape)} for an output {tuple(shape)} with classes on axis "
                f"{axis}, as class_axis or an earlier batch has it",
                remedy="Labels have the output's shape without its class axis",
            )

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Labels (n, t), checked for dtype, shape and range."""
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise InvalidType(
                "class labels must be integers",
                where="target",
                got=target.dtype,
                remedy="Pass torch.long labels (n,); for one logit use likelihood='binary'",
            )
        n, t, c = f.shape
        if target.shape[:1] != (n,) or target.numel() != n * t:
            raise InvalidValue(
                "labels do not match the output",
                where="target",
                got=tuple(target.shape),
                remedy=f"The output has {n} examples, {t} positions and {c} classes",
            )
        if c < 2:
            raise InvalidValue(
                "a softmax over one class carries no information",
                where="model output",
                got="1 output",
                remedy="Use likelihood='binary' for one logit",
            )
        if self.weight is not None:
            check_length(self.weight, (c,), "weight")
        y = target.reshape(n, t).long()
        _, labels = self.kept(y)
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= c:
            raise InvalidValue(
                f"labels outside 0..{c - 1}",
                where="target",
                got=f"labels {low}..{high}",
                remedy=f"Map the labels to class indices; {self.ignore_index} is ignored",
            )
        return y

    def activation(self, f: Tensor) -> str:
        """A softmax or sigmoid; the logarithm of a softmax does no harm."""
        if type(self).distribution is not Categorical.distribution:
            return ""  # what f means is another's word
        return last_activation(f) or ("softmax" if softmax_rows(f) else "")

    def kept(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which labels (n, t) count, and labels with class 0 where they do not."""
        kept = y != self.ignore_index
        return kept, y.where(kept, 0)

    def label_weights(self, y: Tensor) -> Tensor:
        """w_y of each label, 0 where it is ignored, float64, shape (n, t)."""
        kept, labels = self.kept(y)
        return kept.double() if self.weight is None else self.weight.to(y.device)[labels] * kept

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ_t Σ_c q_tc log softmax(f_t)_c, shape (n,)."""
        losses = F.cross_entropy(
            f.flatten(0, 1),
            y.flatten(),
            weight=None if self.weight is None else self.weight.to(f),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return -losses.reshape(y.shape).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood itself."""
        return self.log_prob(f.double(), y, torch.ones((), device="cpu")).sum()

    def log_likelihood(self, statistic: Tensor, count: float, sigma: Tensor) -> Tensor:
        """The summed statistic."""
        return statistic

    target_rows = 2

    def target_sums(self, y: Tensor, f: Tensor) -> Tensor:
        """Labels that count, and Σ q, by class, (2, c)."""
        kept, labels = self.kept(y)
        # Of ones, which float64 adds without rounding in any order.
        counts = torch.zeros(f.shape[-1], dtype=torch.float64, device=y.device)
        counts.index_add_(0, labels.flatten(), kept.flatten().double())
        eye = torch.eye(len(counts), dtype=counts.dtype, device=counts.device)
        return torch.stack([counts, counts @ self._losses(eye)])

    def uninformed(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor] | None:
        """All classes alike."""
        return torch.zeros_like(f[0, 0]), f.new_ones(())

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """That of the frequencies of the classes, as the loss weighs them."""
        if not sums.numel():
            return math.nan
        return float(torch.special.xlogy(sums[1], sums[1] / sums[1].sum()).nansum())

    def determined(self, sums: Tensor, count: float) -> float:
        """C − 1 for each label that counts: a common shift of all logits changes nothing."""
        return float(sums[0].sum()) * (sums.shape[-1] - 1) if sums.numel() else count

    def _losses(self, onehot: Tensor) -> Tensor:
        """q of labels (..., c), with its weights and smoothing."""
        q = onehot
        if self.label_smoothing:
            q = (1 - self.label_smoothing) * q + self.label_smoothing / q.shape[-1]
        return q if self.weight is None else q * self.weight.to(q)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """m(y) softmax(f) − q."""
        kept, labels = self.kept(y)
        q = self._losses(F.one_hot(labels, f.shape[-1]).to(f.dtype))
        # Filled, not multiplied: what the model says at ignored rows may be anything.
        return (q.sum(-1, keepdim=True) * f.softmax(-1) - q).masked_fill(~kept[..., None], 0)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Stick-breaking Cholesky columns: C − 1 of them, each built on the fly in O(n t c)."""
        columns = StickBreaking(f.softmax(-1))
        for c in range(f.shape[-1] - 1):
            yield columns.column(c)

    def softmax_probabilities(self, f: Tensor) -> Tensor | None:
        """softmax(f), but None for a subclass with roots of its own."""
        return f.softmax(-1) if type(self).roots is Categorical.roots else None

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Labels (n, t) drawn from softmax(f) by the Gumbel-max trick."""
        noise = torch.rand(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        tiny = torch.finfo(f.dtype).tiny
        noise = sent(noise, f.device).clamp_min(tiny)
        gumbel = -(-noise.log()).clamp_min(tiny).log()
        return (f + gumbel).argmax(-1)

    def random_root(self, f: Tensor, generator: Generator) -> Tensor:
        """softmax(f) − onehot of a draw, whatever the loss makes of that label."""
        drawn = F.one_hot(self.sample(f, generator), f.shape[-1])
        return f.softmax(-1) - drawn.to(f.dtype)

    def hessian(self, f: Tensor) -> Tensor:
        """diag(p) − p pᵀ."""
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]

    def importance(self, y: Tensor) -> Tensor | None:
        """(1 − ε) w_y + ε/C Σ_c w_c, and 0 for ignored labels, shape (n, t, 1)."""
        kept, _ = self.kept(y)
        if self.weight is None:
            return None if bool(kept.all()) else kept[..., None].double()
        own = (1 - self.label_smoothing) * self.label_weights(y)
        spread = self.label_smoothing * self.weight.mean().to(own)
        return torch.where(kept, own + spread, 0)[..., None]

    def stand_in_targets(self, f: Tensor, generator: Generator) -> Tensor:
        """Draws where classes have weights; otherwise any label that counts, shape (n, t)."""
        if self.weight is not None:
            return self.sample(f, generator)
        counts = 0 if self.ignore_index != 0 else 1
        return torch.full(f.shape[:2], counts, device=f.device)

    def predict(self, latent: Latent, sigma: Tensor, link: str) -> RowPredictive:
        """Probabilities by a link, or by averages over samples."""
        return SoftmaxPredictive(self, latent, link)

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """Probabilities: those of functions, without the draw of a label."""
        return f.softmax(-1)

    def labelled(self, probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Without the labels that are ignored."""
        kept, labels = self.kept(y)
        return probs[kept], labels[kept]

    def options(self) -> dict[str, Any]:
        """The three options, `weight` as a list."""
        return {
            "ignore_index": self.ignore_index,
            "weight": None if self.weight is None else self.weight.tolist(),
            "label_smoothing": self.label_smoothing,
        }


class SoftmaxPredictive(ClassPredictive):
    """Class probabilities by a link, or over samples.

    Args:
        likelihood: for the weights of labels.
        latent: the Gaussian over f, or samples.
        link: "mode", "probit", "centred", "bridge", or "auto" for `averaged`, for the Gaussian.
    """

    def __init__(self, likelihood: Categorical, latent: Latent, link: str):
        super().__init__(latent, lambda f: f.softmax(-1))
        self._likelihood, self._link = likelihood, link

    def linked(self) -> Tensor:
        """Probabilities (n, t, c) by the link."""
        mean, covariance = self.latent.mean, self.latent.covariance
        if self._link == "mode":
            return mean.softmax(-1)
        if self._link == "bridge":
            return bridge(mean, covariance)
        if self._link == "auto":
            return averaged(mean, covariance, self.latent.n_samples, self.latent.seed)
        return (centred if self._link == "centred" else probit)(mean, covariance).softmax(-1)

    def strangeness(self, latent: Latent, head: Tensor) -> Tensor:
        """Entropy of the centred probit with the covariance of the layer used last alone.

        With that of all layers it was no better a score than the entropy at the mode.
        """
        return self.entropy_of(centred(latent.mean, head).softmax(-1)).sum(1)

    def log_prob(self, y: Tensor) -> Tensor:
        """w_y log p_y, 0 for ignored labels, shape (n, t).

        Raises:
            InvalidValue: no label counts.
        """
        weights = self._likelihood.label_weights(y)
        if not bool(weights.any()):
            raise InvalidValue(
                "no target counts",
                where="target",
                got="labels that are ignored or of weight zero, all of them",
                remedy="Pass data with labels that count",
            )
        _, labels = self._likelihood.kept(y)
        return weights * super().log_prob(labels)
