"""Which data choose κ and τ, and by what: leave-one-out on the training data, or held-out data."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from kfac_laplace.options import check_choice, check_iterable
from kfac_laplace.posterior.calibrate.held_out import HeldOut, validation_points
from kfac_laplace.posterior.calibrate.same_data import likeness
from kfac_laplace.posterior.calibrate.scale import adopted_scale, held_out_points
from kfac_laplace.posterior.calibrate.temperature import best_scaling
from kfac_laplace.posterior.calibrate.training_data import TrainingData
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.scaling import Scaling
from kfac_laplace.process import draws_kept

log = logging.getLogger("kfac_laplace")

Method = Literal["auto", "loo", "validation"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Choice:
    """How predictions are scaled, and what that was chosen with.

    Args:
        posterior: whose predictions they are.
        scaling: κ and τ.
        training: the loaders that the fit read.
        held_out: the loader of held-out data that chose them, if one did.
        key_y: name of the targets in mappings.
        seed: of the choice of points left out, and of the points that averages take.
    """

    posterior: Posterior
    scaling: Scaling
    training: TrainingData
    held_out: TrainingData
    key_y: str
    seed: int

    def by(self, loader: Iterable[Any] | None, method: str) -> "Choice":
        """κ and τ anew.

        Args:
            loader: held-out data, or the training data; None: what the fit read.
            method: "loo", "validation", or "auto": held-out data where a loader is given, unless it
                yields the data of the fit.
        """
        check_choice("method", method, METHODS)
        if loader is None:
            return self._validated(None) if method == "validation" else self._left_out(None)
        check_iterable("loader", loader)
        if method == "loo" or (method == "auto" and self.training.has(loader)):
            return self._left_out(loader)
        if isinstance(loader, Iterator):  # it can be read once, and may be wanted again
            with draws_kept():
                loader = list(loader)
        return self._validated(loader) if method == "validation" else self._by_content(loader)

    def again(self) -> "Choice":
        """For a posterior that has moved: held-out data choose anew, where they chose before."""
        if not self.scaling.follows_data or not self.held_out.loaders:
            return self
        return self._validated(self.held_out.loaders[0])

    def after_fit(self, afresh: bool) -> "Choice":
        """For a fit that was given no held-out data.

        Args:
            afresh: whether it forgot the data before. What was held out from them is then no longer
                known to be held out, and what they chose was for another posterior.
        """
        if not afresh:
            return self.again()
        scaling = self.scaling.hand_set
        if scaling is not self.scaling:
            log.info(
                "the scale and temperature of predictions that data chose belong to the fit "
                "before, and are 1 again: pass val_loader to fit, or calibrate"
            )
        return replace(self, scaling=scaling, held_out=TrainingData())

    def _by_content(self, loader: Iterable[Any]) -> "Choice":
        """By held-out data, or leaving out where the loader yields what the fit has read."""
        points = validation_points(self.posterior, loader, self.key_y)
        alike = likeness(self.posterior, points)
        if alike == "data":
            return self._left_out(loader)
        if alike == "targets":
            log.warning(
                "calibrate takes the loader for held-out data, though it has as many examples as "
                "the fit and the same targets: pass method='loo' if it is the training data"
            )
        return self._from(points, loader)

    def _validated(self, loader: Iterable[Any] | None) -> "Choice":
        """By held-out data."""
        points = held_out_points(self.posterior, "validation", [loader], self.key_y, self.seed)
        assert loader is not None
        return self._from(points, loader)

    def _from(self, points: HeldOut, loader: Iterable[Any]) -> "Choice":
        """By points of a loader: κ and, where outputs are logits, τ."""
        likelihood = self.posterior.ggn.likelihood
        sigma = self.posterior.hyperparameters.sigma_noise.detach()
        if likelihood.has_logits:
            kappa, tau = best_scaling(likelihood, points, sigma, self.seed)
        else:
            before, tau = float(self.scaling.scale), 1.0
            kappa = adopted_scale(likelihood, points, sigma, method="validation", before=before)
        return replace(
            self,
            scaling=self.scaling.validated(kappa, tau),
            held_out=TrainingData((loader,)),
        )

    def _left_out(self, loader: Iterable[Any] | None) -> "Choice":
        """κ by leave-one-out, under τ as it was given; as it is where that gives no ground."""
        loaders = self.training.loaders if loader is None else [loader]
        points = held_out_points(self.posterior, "loo", loaders, self.key_y, self.seed)
        before = float(self.scaling.scale)
        found = adopted_scale(
            self.posterior.ggn.likelihood,
            points.at(1.0, float(self.scaling.left_out(before).temperature)),
            self.posterior.hyperparameters.sigma_noise.detach(),
            method="loo",
            before=before,
        )
        if found == before:
            return self
        return replace(self, scaling=self.scaling.left_out(found))
