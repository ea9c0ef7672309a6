"""The linearised posterior of a network as a model of BoTorch: `LaplaceModel`.

f(x) = f_θ*(x) + J(x)(θ − θ*) with θ ~ N(θ*, κ P⁻¹) is a Gaussian process, which acquisition
functions ask for its joint posterior at a few points, with gradients, and given more observations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.errors import InvalidType, InvalidValue, MissingPackage, UnsupportedUse
from kfac_laplace.integrations.conditioning import Observations, Values
from kfac_laplace.laplace import Laplace
from kfac_laplace.posterior.gaussian import Posterior as WeightPosterior
from kfac_laplace.posterior.predict.glm import output_features, output_mean
from kfac_laplace.posterior.predict.in_graph import features_in_graph
from kfac_laplace.posterior.predict.inputs import inputs_of

try:
    from botorch.models.model import FantasizeMixin, Model
    from botorch.posteriors import Posterior
    from botorch.posteriors.gpytorch import GPyTorchPosterior
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from linear_operator import to_linear_operator
except Exception as error:  # builds that do not match raise other errors
    raise MissingPackage(
        "this model is one of BoTorch's, which cannot be imported",
        where=__name__,
        got=error,
        remedy='Install it: pip install "kfac-laplace[botorch]"',
    ) from error


@dataclass(frozen=True)
class Weights:
    """N(θ*, κ P⁻¹), of which a process is made.

    Args:
        posterior: at κ = 1.
        scale: κ, shape ().
    """

    posterior: WeightPosterior
    scale: Tensor


class LaplaceModel(Model, FantasizeMixin):  # type: ignore[misc]  # botorch's bases are Any
    """A fitted Laplace posterior of a regression, for BoTorch's acquisition functions.

    Predictions are those of `laplace(x, joint=True)` at its hyperparameters of the moment; once
    conditioned on observations, of that moment. The network's parameters are constants: they are no
    parameters of this module, and `train` and `eval` leave the network's mode alone.

    Args:
        laplace: fitted, of a regression whose outputs are (n, m).
        input_transform: takes X to the inputs that the network was trained on.
        outcome_transform: took targets to those that it was trained on; posteriors are in units of
            the targets before it.

    Raises:
        InvalidType: no `Laplace`.
        NotFitted: one that was not fitted.
        UnsupportedUse: another likelihood, or outputs with positions.
    """

    def __init__(
        self,
        laplace: Laplace,
        *,
        input_transform: nn.Module | None = None,
        outcome_transform: nn.Module | None = None,
    ):
        super().__init__()
        if not isinstance(laplace, Laplace):
            raise InvalidType(
                "not a Laplace posterior",
                where="laplace",
                got=type(laplace).__name__,
                remedy="Pass Laplace(model, 'regression').fit(loader)",
            )
        if not laplace.posterior.ggn.likelihood.has_gaussian_noise:
            raise UnsupportedUse(
                "only a regression is a Gaussian process",
                where="likelihood",
                got=type(laplace.likelihood).__name__,
                remedy="Use Laplace(model, 'regression')",
            )
        self.laplace = laplace
        self._outputs: tuple[int, ...] = tuple(range(laplace.n_outputs))
        self._seen: Observations | None = None
        self._then: Weights | None = None  # by which the features of what was seen were made
        # As attributes only where there are some: BoTorch asks whether they exist.
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self.eval()

    @property
    def num_outputs(self) -> int:
        """m."""
        return len(self._outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batches of observations that the model was conditioned on."""
        return torch.Size() if self._seen is None else self._seen.batch_shape

    @property
    def likelihood(self) -> Any:
        """p(y | f), this library's."""
        return self.laplace.likelihood

    def train(self, mode: bool = True) -> "LaplaceModel":
        """Set the mode of the transforms."""
        nn.Module.train(self, mode)  # BoTorch's own looks for training inputs
        return self

    def eval(self) -> "LaplaceModel":
        """Set the transforms to evaluation mode."""
        return self.train(False)

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Posterior:
        """The joint posterior at the q points of each batch, differentiable in X.

        Args:
            X: shape (*b, q, d).
            output_indices: of these outputs alone.
            observation_noise: True adds σ²; a tensor (..., q or 1, m) its variances, in units of
                the targets that the network was trained on.
            posterior_transform: applied to what is returned.

        Raises:
            InvalidValue: X of another shape, an index out of range.
        """
        if output_indices is not None:
            chosen = self.subset_output(output_indices)
            if isinstance(observation_noise, Tensor) and observation_noise.shape[-1] > 1:
                observation_noise = observation_noise[..., output_indices]
            return chosen.posterior(X, None, observation_noise, posterior_transform)
        self.eval()
        values = self._values(self.transform_inputs(X))
        if self._seen is None:
            mean, covariance = values.mean, values.features @ values.features.mT
        else:
            mean, covariance = self._seen.moments(values)
        if observation_noise is not False:
            covariance = covariance + torch.diag_embed(self._noise(observation_noise, mean))
        posterior = GPyTorchPosterior(self._normal(mean, covariance))
        transform: Any = getattr(self, "outcome_transform", None)
        if transform is not None:
            posterior = transform.untransform_posterior(posterior)
        if posterior_transform is not None:
            return posterior_transform(posterior=posterior, X=X)
        return posterior

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> "LaplaceModel":
        """The Gaussian process given more observations; the network is not trained on them.

        Exact for the linearised network, at κ, δ and σ as they are. Far from its data the network
        has to be trained again, which `Laplace.fit` does not do either.

        Args:
            X: shape (*b, n, d).
            Y: shape (*b', n, m), whose last axes of b' broadcast with b.
            noise: variances of the observations, like Y, in units of the targets that the network
                was trained on; by default σ²T, as the posterior weighs its own data.
            kwargs: none.

        Raises:
            InvalidType: an argument that is none.
            InvalidValue: shapes that do not fit, or a noise that is not positive.
        """
        if kwargs:
            raise InvalidType(
                "no such argument", where="condition_on_observations", got=sorted(kwargs)
            )
        self.eval()
        fit = Y.ndim > 1 and Y.shape[-2:] == (X.shape[-2], self.num_outputs)
        if not fit or not _broadcast(self.batch_shape, X.shape[:-2], Y.shape[:-2]):
            raise InvalidValue(
                "observations have a row for each point and a column for each output",
                where="Y",
                got=f"shape {tuple(Y.shape)} for X {tuple(X.shape)}, {self.num_outputs} outputs",
                remedy="Pass Y of shape (..., n, m), whose batches broadcast with those of X, and "
                "of earlier observations",
            )
        if hasattr(self, "outcome_transform"):
            Y, _ = self.outcome_transform(Y)
        values = self._values(self.transform_inputs(X))
        residuals = Y.flatten(-2) - values.mean
        more = Observations(values.features, residuals, self._noise(noise, residuals))
        if not bool((more.noise > 0).all()):
            raise InvalidValue("variances must be positive", where="noise")
        made = self._with_outputs(self._outputs)
        made._seen = more if self._seen is None else self._seen.and_also(more)
        made._then = self._weights
        return made

    def subset_output(self, idcs: list[int]) -> "LaplaceModel":
        """The same process, of which some outputs are looked at."""
        m = self.num_outputs
        if not idcs or any(not -m <= index < m for index in idcs):
            raise InvalidValue("no such outputs", where="idcs", got=idcs, remedy=f"There are {m}")
        made = self._with_outputs([self._outputs[index] for index in idcs])
        transform: Any = getattr(self, "outcome_transform", None)
        if transform is not None:
            made.outcome_transform = transform.subset_output(idcs=idcs)
        return made

    def _with_outputs(self, outputs: Sequence[int]) -> "LaplaceModel":
        made = LaplaceModel(
            self.laplace,
            input_transform=getattr(self, "input_transform", None),
            outcome_transform=getattr(self, "outcome_transform", None),
        )
        made._outputs, made._seen, made._then = tuple(outputs), self._seen, self._then
        return made

    @property
    def _weights(self) -> Weights:
        """Those of the moment, or of the moment of the first observations."""
        return self._then or Weights(self.laplace.posterior, self.laplace.posterior_scale)

    def _values(self, X: Tensor) -> Values:
        """f at the points of each batch, outputs of a point behind one another, in X's dtype."""
        if X.ndim < 2:
            raise InvalidValue(
                "points are rows",
                where="X",
                got=f"shape {tuple(X.shape)}",
                remedy="Pass (..., q, d)",
            )
        *b, q, _ = X.shape
        weights = self._weights
        some = next(iter(weights.posterior.mode_for_model.values()))
        points = X.reshape(-1, X.shape[-1]).to(some)
        if torch.is_grad_enabled() and points.requires_grad:
            mean, features = self._in_graph(weights.posterior, points)
        else:
            pieces = self._pieces(weights.posterior, points)
            parts = [self._at(weights.posterior, batch) for batch in pieces]
            mean, features = (torch.cat(each) for each in zip(*parts, strict=True))
        features = features * weights.scale.sqrt().to(features)
        chosen = list(self._outputs)
        mean = mean.unflatten(0, (len(points), -1))[:, chosen]
        features = features.unflatten(0, (len(points), -1))[:, chosen]
        shape = (*b, q * len(chosen))
        return Values(mean.reshape(shape).to(X), features.reshape(*shape, -1).to(X))

    def _in_graph(self, posterior: WeightPosterior, points: Tensor) -> tuple[Tensor, Tensor]:
        """f (n m,) and φ (n m, p) with gradients in the points."""
        mean, parts = features_in_graph(posterior, self._batch(posterior, points))
        return mean, torch.cat(parts, 1)

    def _at(self, posterior: WeightPosterior, batch: AnyBatch) -> tuple[Tensor, Tensor]:
        """f (n m,) and φ (n m, p)."""
        mean = output_mean(posterior, batch)[0].flatten()
        return mean, torch.cat(output_features(posterior, batch), 1)

    def _pieces(self, posterior: WeightPosterior, points: Tensor) -> Iterator[AnyBatch]:
        """Points as batches whose gradients stay under the budget."""
        entries = self.laplace.n_outputs * self.laplace.n_params
        step = at_once(entries, posterior.network.budget.gradients(points))
        return iter(self._batch(posterior, points).split(step))

    def _batch(self, posterior: WeightPosterior, points: Tensor) -> AnyBatch:
        return inputs_of(posterior, points, self.laplace.dict_key_y)

    def _noise(self, given: bool | Tensor | None, like: Tensor) -> Tensor:
        """Variances (*b, q m), like a mean: σ², for observations to come; σ²T, for those made."""
        if isinstance(given, Tensor):
            per_output = like.unflatten(-1, (-1, self.num_outputs))
            if not _broadcast(given.shape, per_output.shape, into=per_output.shape):
                raise InvalidValue(
                    "noise has a variance for each observation",
                    where="noise",
                    got=f"shape {tuple(given.shape)}",
                    remedy=f"Pass one that expands to {tuple(per_output.shape)}",
                )
            return given.to(like).expand_as(per_output).flatten(-2)
        hyper = self._weights.posterior.hyperparameters
        noise = hyper.sigma_noise**2
        noise = noise * hyper.temperature if given is None else noise
        return noise.to(like).expand_as(like)

    def _normal(self, mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        """Of one output, or of several with the outputs of a point behind one another."""
        # A network's covariance at many points is singular, which operators wait for until they are
        # drawn from, and a tensor is refused for.
        operator = to_linear_operator(covariance)
        if self.num_outputs == 1:
            return MultivariateNormal(mean, operator)
        table = mean.unflatten(-1, (-1, self.num_outputs))
        return MultitaskMultivariateNormal(table, operator, interleaved=True)


def _broadcast(*shapes: torch.Size, into: torch.Size | None = None) -> bool:
    """Whether shapes broadcast, to a given one if there is one."""
    try:
        found = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return into is None or found == into
