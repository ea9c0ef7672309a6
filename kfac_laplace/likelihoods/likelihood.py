"""What a likelihood has to say about itself, and what follows from its distribution."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical, Distribution

from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods.axes import ambiguous, classes_last, fits, same_layout
from kfac_laplace.likelihoods.checks import check_finite, check_leading_axes, target_of
from kfac_laplace.likelihoods.distributions import by_row, draw
from kfac_laplace.likelihoods.latent import Latent
from kfac_laplace.likelihoods.predictive import ClassPredictive, Mixture, RowPredictive
from kfac_laplace.likelihoods.roots import eigen_roots
from kfac_laplace.states.plain import same


class Likelihood(ABC):
    """p(y | f) for one output row f, independent over examples and positions.

    `distribution` and `hessian` are all that is needed; what else there is follows from them and is
    overridden where a closed form is better. A likelihood with a noise σ also sets `has_noise`, and
    overrides `precision`, `statistic` and `log_likelihood`.

    The curvature of a row is D Λ(f) D: Λ comes from `roots`, `random_root` and `hessian` and does
    not depend on the target; D = diag √m(y) comes from `importance` and is 1 unless overridden.
    """

    #: whether the likelihood has an observation noise σ
    has_noise = False
    #: whether y | f ~ N(f, σ² I): MacKay's formula for σ holds, and the moments of f say all
    has_gaussian_noise = False
    #: whether outputs are logits: links make probabilities of them, and a temperature divides them
    has_logits = False
    #: whether the fit takes pairs of inputs along axis 1, and predictions single ones as well
    of_pairs = False
    #: number of rows of `target_sums`, the first and last of them ≥ 0; None where it is not known
    target_rows: int | None = None

    # --- the density -------------------------------------------------------------------------

    @property
    def shows_outputs(self) -> bool:
        """Whether calling a posterior gives mean and covariance of f; else it gives E[y]."""
        return self.has_gaussian_noise

    @abstractmethod
    def distribution(self, f: Tensor, sigma: Tensor) -> Distribution:
        """p(y | f, σ).

        Args:
            f: outputs of any leading shape, (..., c).
            sigma: the noise, shape (), of f's dtype; 1 without one.

        Returns:
            A distribution of batch shape (...), or (..., c) where each output has a y of its own.
            `torch.distributions.Categorical` means classes: E[y] are then their probabilities.
        """

    @abstractmethod
    def hessian(self, f: Tensor) -> Tensor:
        """Λ for each row at σ = 1, shape (n, t, c, c): the Fisher information of y in f."""

    def rows(self, f: Tensor, sigma: Tensor) -> Distribution:
        """`distribution` with a batch shape (...) for outputs (..., c), at least float32."""
        f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f  # few draw in these
        return by_row(self.distribution(f, sigma.to(f)), f)

    def log_prob(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """log p(y | f, σ) summed over positions and outputs, normalisers included, shape (n,)."""
        return self.rows(f, sigma).log_prob(y).sum(1)

    def statistic(self, f: Tensor, y: Tensor) -> Tensor:
        """Σ over the batch of what `log_likelihood` needs, float64, of one shape for all batches.

        Without a noise the log-likelihood itself.

        Raises:
            UnsupportedUse: a noise, and no statistic of the likelihood's own.
        """
        if self.has_noise:
            raise UnsupportedUse(
                "how the log-likelihood moves with σ must be known without another data pass",
                where=type(self).__name__,
                remedy="Override statistic and log_likelihood, or make the noise an option",
            )
        y = y.double() if y.is_floating_point() else y
        return self.log_prob(f.double(), y, _one(f)).sum()

    def log_likelihood(self, statistic: Tensor, count: float, sigma: Tensor) -> Tensor:
        """log p(D | f, σ) from the summed statistic over `count` scalar outputs, shape ()."""
        return statistic

    # --- what constant outputs would do ------------------------------------------------------

    def target_sums(self, y: Tensor, f: Tensor) -> Tensor:
        """Σ over the batch of what the best constant outputs depend on, float64 (k, c).

        Empty unless overridden: no claim is made then.

        Args:
            y: aligned targets.
            f: outputs (n, t, c), for their shape.
        """
        return torch.zeros(0, dtype=torch.float64, device="cpu")

    def joined_sums(self, one: Tensor, other: Tensor) -> Tensor:
        """`target_sums` of two sets of data together, of as many outputs; their sum by default."""
        return one + other

    def pooled_sums(self, sums: Tensor) -> Tensor:
        """`target_sums` with all outputs as one, (k, 1), to join those of other outputs."""
        return sums.sum(1, keepdim=True)

    def scaled_sums(self, sums: Tensor, weight: float) -> Tensor:
        """`target_sums` of data that each count as much as a weight."""
        return weight * sums

    def constant_log_likelihood(self, sums: Tensor) -> float:
        """log p(D | f, σ) at the best outputs that do not depend on x, and the best σ.

        Args:
            sums: of `target_sums`; NaN without any.
        """
        return math.nan

    def target_spread(self, sums: Tensor) -> float:
        """The noise that constant outputs leave, of likelihoods with a Gaussian one; else NaN.

        Args:
            sums: of `target_sums`; NaN without any.
        """
        return math.nan

    def uninformed(self, y: Tensor, f: Tensor) -> tuple[Tensor, Tensor] | None:
        """Outputs (broadcastable to f) and σ of a prediction that knows no input; None: not known.

        Args:
            y: aligned targets.
            f: outputs (n, t, c).
        """
        return None

    def determined(self, sums: Tensor, count: float) -> float:
        """How many directions data of `count` scalar outputs can determine, at the most.

        Args:
            sums: of `target_sums`, empty for likelihoods without.
            count: number of scalar outputs.
        """
        return count

    # --- targets and outputs -----------------------------------------------------------------

    def class_axis(self, output: Tensor, target: Tensor) -> int:
        """Axis of `output` that holds the c outputs of one row, by the shapes; the last by default.

        It is asked for the first batch whose outputs have more than two axes, unless users give the
        option of that name.

        Raises:
            InvalidValue: the target's leading axes are not the output's, or it has one value a row
                and there are as many positions as outputs, so that the axis may be another.
        """
        shape = output.shape
        self.check_axis(shape, target, -1)
        one_each = len(shape) > 2 and target.shape == (shape[0], *shape[2:])
        if one_each and not same_layout(shape, target.shape) and max(shape[1:]) > 1:
            self.align_target(target, self.align(output.detach(), -1))  # a fault of its own first
            raise ambiguous(shape, target.shape)
        return -1

    def likely_axis(self, shape: Sequence[int]) -> int:
        """`class_axis` by an output's shape alone, before any target is known: the last."""
        return -1

    def axes_of_gradient(self, gradient: Tensor) -> tuple[int, ...] | None:
        """Axes that may be `class_axis`, by a loss's gradient by the output; None: no saying."""
        return None

    @property
    def arranges_targets(self) -> bool:
        """Whether `align_target` comes with a `class_axis` of its own, and so knows of the axis."""
        kinds = type(self).__mro__
        aligns, axis = (
            next(k for k, kind in enumerate(kinds) if name in vars(kind))
            for name in ("align_target", "class_axis")
        )
        return aligns <= axis < kinds.index(Likelihood)

    def check_axis(self, shape: Sequence[int], target: Tensor, axis: int) -> None:
        """Raise `InvalidValue` unless targets fit outputs of a shape whose rows lie along `axis`.

        Args:
            shape: the output's.
            target: its targets, as the loader gave them.
            axis: -1 for the last, otherwise its number.
        """
        if self.arranges_targets:
            return
        if axis == -1 or len(shape) <= 2:
            check_leading_axes(shape, target)
        elif not fits(shape, target.shape, axis):
            raise InvalidValue(
                "targets do not match the output",
                where="target",
                got=f"{tuple(target.shape)} for an output {tuple(shape)} with rows on axis {axis}",
                remedy="Give them the output's shape, with or without that axis",
            )

    def align(self, output: Tensor, class_axis: int) -> Tensor:
        """View `output` as f (n, t, c), differentiably."""
        if output.ndim == 1:
            return output[:, None, None]
        output = classes_last(output, class_axis)
        return output.flatten(1, -2) if output.ndim > 2 else output[:, None]

    def align_target(self, target: Tensor, f: Tensor) -> Tensor:
        """Check `target` against f (n, t, c) and view it as (n, t) labels or (n, t, ·) values.

        By default it has the shape of a draw, any real dtype and values in the support of the
        distribution; nothing is broadcast.

        Raises:
            InvalidValue: another shape, values that are not finite or outside the support.
        """
        check_finite(f)
        with torch.no_grad():
            return target_of(self.rows(f, _one(f)), target, f)

    def activation(self, f: Tensor) -> str:
        """Name of the softmax or sigmoid that outputs f (n, t, c) went through before; or "".

        Where f are logits it is one too many. Without logits there is none.
        """
        return ""

    # --- curvature ---------------------------------------------------------------------------

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """∂(−log p(y | f))/∂f at σ = 1, shape (n, t, c); by autograd unless overridden."""
        return self._gradient(f, y, _one(f))

    def score_with_noise(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """∂(−log p(y | f, σ))/∂f, shape (n, t, c)."""
        return self._gradient(f, y, sigma.to(f)) if self.has_noise else self.score(f, y)

    def _gradient(self, f: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            at = f.detach().clone().requires_grad_()
            loss = -self.log_prob(at, y.clone(), sigma.detach().clone()).sum()
            (gradient,) = torch.autograd.grad(loss, at)
        return gradient

    def roots(self, f: Tensor) -> Iterator[Tensor]:
        """Columns S_k (n, t, c) with Σ_k S_k S_kᵀ = Λ for each row, at σ = 1.

        The eigenvectors of `hessian` unless overridden.
        """
        return eigen_roots(self.hessian(f))

    def softmax_probabilities(self, f: Tensor) -> Tensor | None:
        """p (..., c) where Λ = diag(p) − p pᵀ, whose roots have short forms; None for any other."""
        return None

    def sample(self, f: Tensor, generator: Generator) -> Tensor:
        """Draw aligned targets y ~ p(y | f) at σ = 1."""
        return self._draw(f, _one(f), generator)

    def _draw(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """y ~ p(y | f, σ)."""
        return draw(self.rows(f.detach().cpu(), sigma), generator).to(f.device)

    def random_root(self, f: Tensor, generator: Generator) -> Tensor:
        """A vector v (n, t, c) with E v vᵀ = Λ, independent between rows: the score of a draw.

        Where `importance` is overridden, this has to stay the score without it.
        """
        return self.score(f, self.sample(f, generator))

    def importance(self, y: Tensor) -> Tensor | None:
        """Factors m ≥ 0 on the curvature of targets y, or None where all are 1.

        Returns:
            Shape (n, t, 1), or (n, t, c) where the outputs have factors of their own (Λ is diagonal
            then, so that D Λ D = m Λ). A row of zeros has no curvature at all.
        """
        return None

    def stand_in_targets(self, f: Tensor, generator: Generator) -> Tensor:
        """Targets for `importance` before any are known: draws where it depends on them."""
        weighs = type(self).importance is not Likelihood.importance
        return self.sample(f, generator) if weighs else f

    def precision(self, sigma: Tensor) -> Tensor:
        """Factor 1/σ² by which the stored curvature is scaled; 1 without noise."""
        return torch.ones_like(sigma)

    # --- predictions -------------------------------------------------------------------------

    def predict(self, latent: Latent, sigma: Tensor, link: str) -> RowPredictive:
        """p(y | x) with the outputs integrated out, by averages over points of f.

        Args:
            latent: the Gaussian over outputs, or samples of them.
            sigma: the noise, shape ().
            link: how class probabilities come from the Gaussian; of no meaning here.
        """
        components = self.rows(latent.points[0], sigma)
        if isinstance(components, Categorical):
            return ClassPredictive(latent, lambda f: _probs(self.rows(f, sigma)))
        mean = None
        if latent.samples is None:
            mean = self.predictive_mean(latent.mean, latent.covariance)
        return Mixture(latent, lambda f: self.rows(f, sigma), mean)

    def predictive_mean(self, mean: Tensor, covariance: Tensor) -> Tensor | None:
        """E[y] (n, t, ·) for f ~ N(mean, covariance) where it has a closed form, else None."""
        return None

    def predictive_draws(self, f: Tensor, sigma: Tensor, generator: Generator) -> Tensor:
        """What samples of the predictive show at outputs f (n, t, c): draws of y."""
        return self._draw(f, sigma, generator)

    def labelled(self, probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (rows, k) and labels (rows,) of what counts, to be scored, of logits.

        Args:
            probs: class probabilities (n, t, k).
            y: aligned targets (n, t).
        """
        return probs.flatten(0, 1), y.flatten().long()

    def options(self) -> dict[str, Any]:
        """Constructor arguments as plain data, which tell likelihoods of one class apart."""
        return {}

    def __eq__(self, other: object) -> bool:
        """Whether another is of the same class and options."""
        return type(self) is type(other) and same(self.options(), other.options())

    def __hash__(self) -> int:
        """By class alone: options need not be hashable."""
        return hash(type(self))


def _one(f: Tensor) -> Tensor:
    """σ = 1."""
    return torch.ones((), dtype=f.dtype, device=f.device)


def _probs(distribution: Distribution) -> Tensor:
    """Class probabilities of a categorical distribution."""
    assert isinstance(distribution, Categorical)
    return distribution.probs
