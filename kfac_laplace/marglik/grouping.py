"""Which parameters of a model are trained, and how they are grouped: told anew when they change."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Size, nn

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.fisher import MonteCarlo
from kfac_laplace.curvature.estimate.settings import Setting
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import InvalidValue, KfacLaplaceError, UnsupportedUse
from kfac_laplace.marglik.loss import undivided_prior
from kfac_laplace.marglik.roles import Roles, Tune, check_tune, root_mean_squares
from kfac_laplace.marglik.sample import Examples
from kfac_laplace.marglik.training_mode import Modes, TrainingMode
from kfac_laplace.posterior.prior import Given, Prior, layouts_of
from kfac_laplace.posterior.sharing import PriorStructure, resolve_sharing


@dataclass(frozen=True)
class Grouping:
    """The trained parameters of a model at some time, with what batches have taught about them.

    Args:
        model: as the caller trains it.
        options: of the curvature.
        structure: how precisions are shared.
        mean: μ as it was given.
        known: groups, class axis and how rows lie.
        shapes: the trained parameters that the options admit.
        prior: over the groups; None before a batch was seen.
        examples: a few of the data, None before a batch was seen.
        tune: which precisions are tuned.
        began: root mean squares of the parameters when the tuner was made.
        training: what is special about training mode, None while it was not looked at.
        settings: expand or reduce by group, none while they are to be decided. Rounds keep them:
            evidences by others could not be compared.
    """

    model: nn.Module
    options: CurvatureOptions
    structure: PriorStructure
    mean: Given
    known: Knowledge
    shapes: Mapping[str, Size]
    prior: Prior | None = None
    examples: Examples | None = None
    tune: Tune = "auto"
    began: Mapping[str, float] = field(default_factory=dict)
    training: TrainingMode | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        options: CurvatureOptions,
        structure: PriorStructure,
        mean: Given,
        tune: Tune,
    ) -> "Grouping":
        """That of a model of which no batch was seen.

        Raises:
            UnsupportedUse: a subnetwork: the other entries would be trained without a prior.
        """
        if isinstance(options.subset_of_weights, Subnetwork):
            raise UnsupportedUse(
                "a subnetwork is one of a trained network: its other entries would have no prior",
                where="subset_of_weights",
                got=f"{len(options.subset_of_weights.indices)} entries",
                remedy="Tune whole parameters, and choose the subnetwork of Laplace afterwards",
            )
        curvature = Curvature.of(model, options)
        known, shapes = curvature.ggn.knowledge, _shapes(curvature)
        tune = check_tune(tune, curvature.network.shapes)
        began = root_mean_squares(curvature.network.parameters(known.tracked))
        return cls(model, options, structure, mean, known, shapes, tune=tune, began=began)

    @property
    def roles(self) -> Roles:
        """Which precisions are tuned, of the groups that were found."""
        network, groups = Curvature.of(self.model, self.options).network, self.known.groups
        params = tuple(name for group in groups for name in group.layout.params)
        now = root_mean_squares(network.parameters(params))
        return Roles.of(groups, self.tune, self.training or TrainingMode(), (self.began, now))

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter is treated, and whether its precision is tuned, or why it is not."""
        if not self.known.groups:
            return {}
        held, effective = self.roles.held, self.known.effective
        unused = self.known.unused if effective else ()  # a state does not tell
        kinds = {"diag": "diag", "full": "dense", "lowrank": "lowrank"}
        said: dict[str, str] = {}
        for group in self.known.groups:
            kind = kinds.get(self.options.structure, group.treatment)
            tuned = f"held: {held[group.name]}" if group.name in held else "tuned"
            said |= dict.fromkeys(group.layout.params, f"{kind}, {tuned}")
        said |= dict.fromkeys(unused, "unused")
        shapes = Curvature.of(self.model, self.options).network.shapes
        return {name: said.get(name, "frozen") for name in shapes}

    def looked_at(self, modes: Modes) -> "Grouping":
        """With what training mode is like, where that matters and is not known for these modes.

        Args:
            modes: modes of the model's modules in training.
        """
        if not modes or self.tune != "auto" or self.examples is None:
            return self
        if self.training is not None and self.training.modes == tuple(modes.values()):
            return self
        network = Curvature.of(self.model, self.options).network
        batch = network.batch(self.examples.x, len(self.examples.y), self.known.interface)
        groups = self.known.groups
        candidates = [g for g in groups if g.role != "bias" and len(g.layout.shapes[0]) > 1]
        training = TrainingMode.of(network, candidates, batch, modes)
        return replace(self, training=training)

    def curvature(self, options: CurvatureOptions | None = None) -> Curvature:
        """A curvature of no data, which knows how rows and outputs lie, and the settings."""
        curvature = Curvature.of(self.model, options or self.options)
        return curvature.remember(self.known, self.settings)

    def grouped(self, known: Knowledge) -> "Grouping":
        """The same parameters in the groups that were found."""
        device = Curvature.of(self.model, self.options).network.device
        layouts = layouts_of(known.groups, known.params)
        prior = Prior.of(resolve_sharing(self.structure), layouts, self.mean, device)
        return replace(self, known=known, prior=prior)

    def today(self) -> "Grouping":
        """Itself while the same parameters are trained on the same device.

        Otherwise those of today: without groups where they are others.
        """
        curvature = Curvature.of(self.model, self.options)
        shapes = _shapes(curvature)
        if [*shapes.items()] != [*self.shapes.items()]:
            known = self.known.axis_alone(tuple(shapes))
            return replace(self, known=known, shapes=shapes, prior=None, training=None, settings={})
        if self.prior is not None and self.prior.device != curvature.network.device:
            return self.grouped(self.known)
        return self

    def regrouped(self, earlier: "Grouping") -> "Grouping":
        """The groups of today's parameters, by the examples at hand.

        Args:
            earlier: the grouping before they changed.

        Raises:
            InvalidValue: there are no examples.
            UnsupportedUse: the model fails on them, or uses a parameter in a way that cannot be
                treated correctly.
        """
        if self.examples is None:
            raise InvalidValue(
                "the parameters that are trained changed",
                where="model",
                got=difference(earlier.shapes, self.shapes),
                remedy="Call tuner.prepare(loader) once: it sees how they are used",
            )
        # Groups are those of any estimator, and this one is the cheapest.
        # All ranks have the same examples.
        curvature = self.curvature(replace(self.options.alone(), fisher=MonteCarlo()))
        try:
            curvature.accumulate(self.examples.x, self.examples.y)
        except KfacLaplaceError:
            raise
        except Exception as error:  # models raise what they like
            raise UnsupportedUse(
                "the parameters that are trained changed, and the model fails on a few examples "
                "that were to show how it uses them",
                where="model",
                got=repr(error),
                remedy="Call tuner.prepare(loader) once",
            ) from error
        return self.grouped(curvature.ggn.knowledge)

    def first_prior(self, several: bool) -> Prior:
        """The prior before a batch was seen: all parameters share one precision, or an error.

        Args:
            several: whether there are several initial precisions.
        """
        means = not isinstance(self.mean, float | Mapping) and self.mean.numel() > 1
        options = self.options
        if (
            several
            or means
            or options.subset_of_weights == "last_layer"
            or options.uncovered == "freeze"
        ):
            only_means = means and not several
            what, where = ("mean", "prior_mean") if only_means else ("precision", "prior_precision")
            raise InvalidValue(
                f"which parameters belong to which {what} shows only when the model is used",
                where=where,
                got="a loss before the first batch was seen",
                remedy="Call tuner.prepare(loader) once before training",
            )
        network = Curvature.of(self.model, options).network
        return undivided_prior(network, tuple(self.shapes), self.mean)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Which parameters are trained now and were not, are no longer, or have another shape."""
    found = {
        "new": [name for name in after if name not in before],
        "gone or frozen": [name for name in before if name not in after],
        "of another shape": [n for n in after if n in before and before[n] != after[n]],
    }
    parts = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    return "; ".join(parts) or "the same in other groups"


def _shapes(curvature: Curvature) -> dict[str, Size]:
    """Shapes of the parameters that a curvature tracks."""
    tracked = curvature.ggn.knowledge.tracked
    return {name: p.shape for name, p in curvature.network.parameters(tracked).items()}
