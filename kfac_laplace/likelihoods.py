"""Likelihoods p(y | f): log-densities, scores, label draws and roots of their curvature.

Everything works on *aligned* outputs f (n, t, c): n examples, t positions that the loss keeps
(1 for one output row an example), c outputs. Curvature is stored at σ = 1; the noise enters only
through `precision` and `log_likelihood`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kfac_laplace.errors import InvalidType, InvalidValue


class Likelihood(ABC):
    """p(y | f) for one output row f, independent over examples and positions."""

    #: whether the likelihood has an observation noise σ
    has_noise = False

    @abstractmethod
    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """Axis of `output` that holds the c outputs of one row, -1 or 1."""

    def align(self, output: Tensor, class_axis: int) -> Tensor:
        """View `output` as f (n, t, c), differentiably."""
        if output.ndim == 1:
            return output[:, None, None]
        if class_axis == 1:
            output = output.movedim(1, -1)
        return output.flatten(1, -2) if output.ndim > 2 else output[:, None]

    @abstractmethod
    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Check `target` against f (n, t, c) and view it as (n, t) labels or (n, t, c) values."""

    @abstractmethod
    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """log p(y | f, σ) summed over positions and outputs, normalisers included, shape (n,)."""

    @abstractmethod
    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """Σ over the batch of what `log_likelihood` needs, float64, shape ()."""

    @abstractmethod
    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """log p(D | f, σ) from the summed statistic over `count` scalar outputs, shape ()."""

    @abstractmethod
    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """∂(−log p(y | f))/∂f at σ = 1, shape (n, t, c)."""

    @abstractmethod
    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Columns S_k (n, t, c) with Σ_k S_k S_kᵀ = Λ = ∇²(−log p) for each row, at σ = 1."""

    @abstractmethod
    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw aligned targets y ~ p(y | f) at σ = 1."""

    @abstractmethod
    def hessian(self, f: Tensor) -> Tensor:
        """Λ for each row at σ = 1, shape (n, t, c, c)."""

    def precision(self, sigma: Tensor) -> Tensor:
        """Factor 1/σ² by which the stored curvature is scaled; 1 without noise."""
        return torch.ones_like(sigma)


def check_finite(f: Tensor, where: str = "model output") -> None:
    """Raise `InvalidValue` unless every entry is finite."""
    if not bool(torch.isfinite(f).all()):
        raise InvalidValue(
            "non-finite values",
            where=where,
            got=f"{int((~torch.isfinite(f)).sum())} of {f.numel()} entries",
            remedy="Check the inputs and the weights; nothing was changed",
        )


class Categorical(Likelihood):
    """Softmax likelihood of integer labels: Λ = diag(p) − p pᵀ, of rank C − 1."""

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis where `output.shape[:-1] == target.shape`, else axis 1."""
        if output.shape[:-1] == target.shape:
            return -1
        if output.ndim < 2 or target.shape != (output.shape[0], *output.shape[2:]):
            raise InvalidValue(
                "labels do not match the output",
                where="target",
                got=f"{tuple(target.shape)} for an output {tuple(output.shape)}",
                remedy="Labels have the output's shape without its class axis, last or second",
            )
        return 1

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
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= c:
            raise InvalidValue(
                f"labels outside 0..{c - 1}",
                where="target",
                got=f"labels {low}..{high}",
                remedy="Map the labels to class indices",
            )
        return target.reshape(n, t).long()

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ_t log softmax(f_t)[y_t], shape (n,)."""
        return f.log_softmax(-1).gather(-1, y[..., None]).flatten(1).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood itself."""
        return self.log_prob(f.double(), y, torch.ones(())).sum()

    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """The summed statistic."""
        return statistic

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """Softmax(f) − onehot(y)."""
        return f.softmax(-1) - F.one_hot(y, f.shape[-1]).to(f.dtype)

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Stick-breaking Cholesky columns: C − 1 of them, each built on the fly in O(n t c).

        With tails q_c = Σ_{j ≥ c} p_j: S[c, c] = √(p_c q_{c+1} / q_c) and
        S[j > c, c] = −p_j / q_{c+1} · S[c, c].
        """
        p = f.softmax(-1)
        # A reverse cumulative sum: 1 − cumsum loses the small tails to cancellation.
        tail = p.flip(-1).cumsum(-1).flip(-1)  # (n, t, c)
        tiny = torch.finfo(p.dtype).tiny
        for c in range(p.shape[-1] - 1):
            rest = tail[..., c + 1]
            pivot = (p[..., c] * rest / tail[..., c].clamp_min(tiny)).sqrt()
            column = torch.zeros_like(p)
            column[..., c] = pivot
            column[..., c + 1 :] = (
                -(p[..., c + 1 :] / rest.clamp_min(tiny)[..., None]) * (pivot[..., None])
            )
            yield column

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Labels (n, t) drawn by the Gumbel-max trick."""
        noise = torch.rand(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        tiny = torch.finfo(f.dtype).tiny
        gumbel = -(-noise.to(f.device).clamp_min(tiny).log()).clamp_min(tiny).log()
        return (f + gumbel).argmax(-1)

    def hessian(self, f: Tensor) -> Tensor:
        """diag(p) − p pᵀ."""
        p = f.softmax(-1)
        return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


class Gaussian(Likelihood):
    """N(y | f, σ² I): Λ = I at σ = 1."""

    has_noise = True

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis; every output has the same curvature, so none is special."""
        _check_same_layout(output, target)
        return -1

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Values (n, t, c); no broadcasting, which would regress on the wrong pairs."""
        return _elementwise_target(target, f)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """−½ Σ (y − f)²/σ² − ½ t c log 2πσ², shape (n,)."""
        squares = (y - f).square().flatten(1).sum(1)
        count = f[0].numel()
        return -0.5 * squares / sigma**2 - 0.5 * count * (2 * math.pi * sigma**2).log()

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual sum of squares."""
        return (y.double() - f.double()).square().sum()

    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """−RSS/(2σ²) − ½ count log 2πσ²."""
        return -0.5 * statistic / sigma**2 - 0.5 * count * (2 * math.pi * sigma**2).log()

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """The residual f − y."""
        return f - y

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """The c unit vectors."""
        for c in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., c] = 1
            yield column

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Add standard normal noise to f."""
        noise = torch.randn(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        return f + noise.to(f.device)

    def hessian(self, f: Tensor) -> Tensor:
        """The identity."""
        return torch.eye(f.shape[-1], dtype=f.dtype, device=f.device).expand(*f.shape, -1)

    def precision(self, sigma: Tensor) -> Tensor:
        """1/σ²."""
        return sigma**-2


class Bernoulli(Likelihood):
    """Logistic likelihood of each logit on its own: Λ = diag(p (1 − p))."""

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """The last axis."""
        _check_same_layout(output, target)
        return -1

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Targets in [0, 1] of any real dtype, as (n, t, c)."""
        if target.numel() == f.numel() and target.shape[:1] == f.shape[:1]:
            target = target.reshape(f.shape)
        y = _elementwise_target(target.to(f.dtype), f)
        if float(y.min()) < 0 or float(y.max()) > 1:
            raise InvalidValue(
                "binary targets outside [0, 1]",
                where="target",
                got=f"values {float(y.min())}..{float(y.max())}",
                remedy="Pass 0 and 1",
            )
        return y

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Σ y log p + (1 − y) log(1 − p), shape (n,)."""
        losses = F.binary_cross_entropy_with_logits(f, y, reduction="none")
        return -losses.flatten(1).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """The log-likelihood itself."""
        return self.log_prob(f.double(), y.double(), torch.ones(())).sum()

    def log_likelihood(self, statistic: Tensor, count: int, sigma: Tensor) -> Tensor:
        """The summed statistic."""
        return statistic

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """Sigmoid(f) − y."""
        return f.sigmoid() - y

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """One column for each logit: √(p (1 − p))."""
        # σ(f) σ(−f) keeps its digits where 1 − σ(f) rounds to zero.
        spread = (f.sigmoid() * (-f).sigmoid()).sqrt()
        for c in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., c] = spread[..., c]
            yield column

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw zeros and ones."""
        noise = torch.rand(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
        return (noise.to(f.device) < f.sigmoid()).to(f.dtype)

    def hessian(self, f: Tensor) -> Tensor:
        """diag(p (1 − p))."""
        return torch.diag_embed(f.sigmoid() * (-f).sigmoid())


def _check_same_layout(output: Tensor, target: Tensor) -> None:
    """Targets are shaped as the output, but for axes of length 1: no broadcasting."""
    if [s for s in output.shape if s != 1] != [s for s in target.shape if s != 1]:
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=f"{tuple(target.shape)} for an output {tuple(output.shape)}",
            remedy="Give them the output's shape",
        )


def _elementwise_target(target: Tensor, f: Tensor) -> Tensor:
    """Check that `target` has one value for each output and view it as f."""
    if not target.is_floating_point():
        raise InvalidType(
            "targets must be floating point",
            where="target",
            got=target.dtype,
            remedy="Convert them with target.float()",
        )
    n, t, c = f.shape
    if target.ndim == 1:
        fits = t * c == 1 and target.shape == (n,)
    else:
        fits = target.shape[0] == n and target.numel() == f.numel() and target.shape[-1] == c
    if not fits:
        raise InvalidValue(
            "targets do not match the output",
            where="target",
            got=tuple(target.shape),
            remedy=f"The output has {n} examples, {t} positions and {c} outputs",
        )
    check_finite(target, where="target")
    return target.reshape(f.shape).to(f.dtype)


NAMED: dict[str, type[Likelihood]] = {
    "classification": Categorical,
    "regression": Gaussian,
    "binary": Bernoulli,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood named by a string, or the object itself."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in NAMED:
        return NAMED[likelihood]()
    kind = InvalidValue if isinstance(likelihood, str) else InvalidType
    raise kind(
        "unknown likelihood",
        where="likelihood",
        got=repr(likelihood),
        remedy=f"Choose one of {sorted(NAMED)} or pass a Likelihood object",
    )
