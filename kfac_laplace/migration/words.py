"""`LaplaceTorchWords`: what laplace-torch's users have in their fingers, on `Laplace`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from typing_extensions import Self

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue
from kfac_laplace.likelihoods.links import Link
from kfac_laplace.migration import moments, refused
from kfac_laplace.migration.arguments import counted, number
from kfac_laplace.migration.prior_search import Method, PriorSearch, plain, refuse
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.predict.predictor import Predictor, PredType
from kfac_laplace.posterior.prior import Given
from kfac_laplace.posterior.sharing import (
    PriorStructure,
    Sharing,
    check_sharing,
    resolve_sharing,
)


class LaplaceTorchWords(ABC):
    """Names of laplace-torch 0.3 that mean here what they mean there, or say which word does."""

    options: CurvatureOptions
    curvature: Curvature
    prior_precision: Any
    posterior_scale: Any
    optimize_prior: Callable[..., Any]
    _sharing: Sharing
    _structure: PriorStructure
    _draws: Generator
    _hyper: Hyperparameters
    _mode: dict[str, Tensor]
    _adopt: Callable[..., None]
    _on_grid: Callable[..., Any]

    @property
    @abstractmethod
    def posterior(self) -> Posterior:
        """The fitted posterior."""

    @property
    @abstractmethod
    def _predictor(self) -> Predictor: ...

    def _source(self, generator: Generator | None) -> Generator:
        """Where draws come from: without a generator each call goes on where the last one ended."""
        return self._draws if generator is None else generator

    # --- the prior ---------------------------------------------------------------------------

    @refused.answering(refused.SEARCH)
    def optimize_prior_precision(
        self,
        pred_type: PredType | Method = "glm",
        method: Method = "marglik",
        n_steps: int | None = None,
        lr: float | None = None,
        init_prior_prec: Given | None = None,
        prior_structure: PriorStructure | None = None,
        val_loader: Iterable[Any] | None = None,
        loss: Any = None,
        log_prior_prec_min: float | None = None,
        log_prior_prec_max: float | None = None,
        grid_size: int | None = None,
        link_approx: Link | None = None,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float | None = None,
        grid: Iterable[float] | None = None,
        **options: Any,
    ) -> Self:
        """`optimize_prior` in laplace-torch's words; enumerations are understood as well.

        Args:
            pred_type: how predictions will be made; a grid search scores those of "glm". The method
                may stand here too, as in `optimize_prior`.
            method: "marglik", "mackay" or "gridsearch".
            n_steps: most iterations. They end at the maximum; there, all are made.
            lr: refused: the search finds its own step lengths.
            init_prior_prec: δ at which "marglik" and "mackay" begin; by default today's, or 1 where
                `prior_structure` changes.
            prior_structure: how δ is shared from now on; by default as it was.
            val_loader: validation data, for "gridsearch".
            loss: refused: a grid search scores the NLL.
            log_prior_prec_min: exponent of the first candidate, −4 by default.
            log_prior_prec_max: exponent of the last, 4 by default.
            grid_size: number of candidates, 100 by default.
            link_approx: by which a grid search predicts; by default that of `la(x)`.
            verbose: print δ at the end.
            progress_bar: show one over the candidates; other methods take no time to speak of.
            log_prior_prec_base: base of the exponents, 10 by default.
            grid: the candidates themselves.
            options: others of `optimize_prior`.

        Raises:
            InvalidType: an argument that means nothing here; which word does is said.
            InvalidValue: as for `optimize_prior`; an option that a grid search does not take.
                The posterior is as it was after any error.
        """
        refuse(lr=lr, loss=loss)
        theirs = {
            "log_prior_prec_min": log_prior_prec_min,
            "log_prior_prec_max": log_prior_prec_max,
            "grid_size": grid_size,
            "log_prior_prec_base": log_prior_prec_base,
        }
        search = PriorSearch.of(pred_type, method, link_approx, grid, theirs)
        before = dict(vars(self))
        try:
            if search.method == "gridsearch" and options:
                raise InvalidValue(
                    "a grid search has no use for this",
                    where=", ".join(options),
                    got="method='gridsearch'",
                    remedy="Leave it out, or use method='marglik'",
                )
            if search.method == "gridsearch":
                self._begin(plain(prior_structure), None)
                self._on_grid(val_loader, search.grid, link=search.link, progress=progress_bar)
            else:
                self._begin(plain(prior_structure), init_prior_prec)
                steps = {} if n_steps is None else {"n_steps": n_steps}
                self.optimize_prior(search.method, val_loader=val_loader, **steps, **options)
        except BaseException:
            vars(self).update(before)
            raise
        if verbose:
            print(f"Optimized prior precision is {self.posterior.hyperparameters.prior_precision}.")
        return self

    def _begin(self, structure: PriorStructure | None, start: Given | None) -> None:
        """Share δ in another way, and begin at a value of it."""
        if structure is not None:
            sharing = resolve_sharing(structure)
            check_sharing(sharing, self.options.hessian_structure)
            self.posterior  # noqa: B018  # says that there is none
            if sharing != self._sharing:
                start = 1.0 if start is None else start
                self._sharing, self._structure = sharing, deepcopy(structure)
                one = torch.ones_like(self._hyper.prior_precision[:1])
                self._hyper = replace(self._hyper, prior_precision=one)
                self._adopt(self.curvature, self._mode)
        if start is not None:
            self.prior_precision = start

    # --- draws -------------------------------------------------------------------------------

    def sample(
        self, n: int = 100, generator: Generator | None = None, *, n_samples: int | None = None
    ) -> Tensor:
        """Draw parameter vectors from N(θ*, κ P⁻¹).

        Args:
            n: number of draws.
            generator: source of the randomness; by default one that `fit` seeds with `seed`, so
                that each call draws anew.
            n_samples: laplace-torch's name for n.

        Returns:
            Float64 rows (n, P) in the order of `parameters_to_vector`, of the parameters in the
            posterior; for a subnetwork of all parameters of the model, the others at their values.
        """
        return self._predictor.parameters(number(n, n_samples), self._source(generator))

    @refused.answering(refused.DRAWS)
    def functional_samples(
        self,
        x: Any,
        n: int | PredType = 100,
        n_samples: int | None = None,
        *,
        pred_type: PredType = "glm",
        generator: Generator | None = None,
        enable_backprop: bool = False,
    ) -> Tensor:
        """Draw functions and evaluate each at all inputs, shape (n, *output shape).

        Args:
            x: inputs as `fit` takes them.
            n: number of draws; `pred_type` where it is a name, as in laplace-torch.
            n_samples: likewise.
            pred_type: "glm" or "linear" for f + J(θ_s − θ*), "nn" for the network at θ_s.
            generator: source of the randomness; by default one that `fit` seeds with `seed`, so
                that each call draws anew.
            enable_backprop: stay in the graph of x; the draws of weights are constants.
        """
        source = self._source(generator)
        wanted = counted(n, n_samples, pred_type)
        return self._predictor.functions(x, *wanted, source, enable_backprop)

    @refused.answering(refused.DRAWS)
    def predictive_samples(
        self,
        x: Any,
        n: int | PredType = 100,
        n_samples: int | None = None,
        *,
        pred_type: PredType = "glm",
        generator: Generator | None = None,
    ) -> Tensor:
        """Draws of class probabilities, or of y with its noise for other likelihoods.

        Arguments and shape as for `functional_samples`, from the same functions.
        """
        source = self._source(generator)
        return self._predictor.targets(x, *counted(n, n_samples, pred_type), source)

    # --- the Gaussian ------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """The mean of what `sample` draws, in the order of `parameters_to_vector`, float64.

        θ* (P,) of the parameters in the posterior; of a subnetwork all of the model's parameters.
        """
        return moments.drawn_mean(self.posterior)

    @property
    def n_params(self) -> int:
        """P, the number of parameters in the posterior; the length of `mean`."""
        return sum(value.numel() for value in self.posterior.drawn.values())

    @property
    def mean_subnet(self) -> Tensor:
        """θ* (k,) of the entries in the posterior, float64."""
        return moments.mean(self.posterior)

    @property
    def n_params_subnet(self) -> int:
        """k, the number of entries in the posterior."""
        return self.posterior.prior.layouts.size

    @property
    def n_outputs(self) -> int:
        """Number of outputs of an example, where these have no positions."""
        return moments.outputs_of_a_row(self.posterior)

    @property
    def prior_precision_diag(self) -> Tensor:
        """The diagonal of P₀, (P,)."""
        return moments.prior_diagonal(self.posterior)

    @property
    def posterior_precision(self) -> Tensor:
        """P: a vector (P,) under "diag", a matrix (P, P) under "full"; the samples' is P/κ.

        Raises:
            UnsupportedUse: under "kron", "ekfac" and "lowrank", with the words that take its place.
        """
        return moments.precision(self.posterior)

    @property
    def H(self) -> Tensor:
        """The curvature at σ = T = 1: a vector (P,) under "diag", a matrix (P, P) under "full".

        Raises:
            UnsupportedUse: as for `posterior_precision`.
        """
        return moments.curvature(self.posterior, "H")

    def square_norm(self, value: Tensor) -> Tensor:
        """(value − θ*)ᵀ P (value − θ*) of a vector (P,)."""
        return moments.square_norm(self.posterior, value)

    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """log N(value; θ*, P⁻¹) of a vector (P,), without κ; differentiable in the value.

        Args:
            value: parameters in the order of `parameters_to_vector`.
            normalized: with the terms that do not depend on the value.
        """
        return moments.log_prob(self.posterior, value, normalized)

    def predictive_moments(self, x: Any, *, joint: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs at x without noise, as predictions are made of them.

        Args:
            x: inputs as `fit` takes them.
            joint: regression: one mean (N·C,) and covariance (N·C, N·C) over all inputs.

        Returns:
            f/τ, shaped like the output, and κΣ/τ² of each row, (N, C, C), for any likelihood.
        """
        if joint:
            return self._predictor.joint(x, "glm")
        found = self._predictor.predict(x, "glm", "auto", 100, None)
        return found.output_mean, found.covariance

    def functional_variance(self, Js: Tensor) -> Tensor:
        """κ J P⁻¹ Jᵀ for each example, (n, c, c), of Jacobians (n, c, P); before τ."""
        found = moments.features(self.posterior, Js)
        return self.posterior_scale * (found @ found.mT)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """κ J P⁻¹ Jᵀ of all outputs of all examples, (n c, n c), of Jacobians (n, c, P)."""
        found = moments.features(self.posterior, Js).flatten(0, 1)
        return self.posterior_scale * (found @ found.mT)
