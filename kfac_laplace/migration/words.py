"""`LaplaceTorchWords`: what laplace-torch's users have in their fingers, on `Laplace`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.migration.prior_search import PriorSearch, plain, refuse
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
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
    optimize_prior: Callable[..., Any]
    _sharing: Sharing
    _structure: PriorStructure
    _hyper: Hyperparameters
    _mode: dict[str, Tensor]
    _adopt: Callable[..., None]
    _on_grid: Callable[..., Any]

    @property
    @abstractmethod
    def posterior(self) -> Posterior:
        """The fitted posterior."""

    # --- the prior ---------------------------------------------------------------------------

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int | None = None,
        lr: float | None = None,
        init_prior_prec: Given | None = None,
        prior_structure: PriorStructure | None = None,
        val_loader: Iterable[Any] | None = None,
        loss: Any = None,
        log_prior_prec_min: float | None = None,
        log_prior_prec_max: float | None = None,
        grid_size: int | None = None,
        link_approx: str | None = None,
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
            InvalidValue: as for `optimize_prior`. The posterior is as it was after any error.
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
            if search.method == "gridsearch" and not options:
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
