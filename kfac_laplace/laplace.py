"""`Laplace`: the facade that users call. Each verb is a few lines over the modules beside it."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Any, Generic, Literal, overload

import torch
from torch import Generator, Tensor, nn
from typing_extensions import Self, Unpack

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.checkpoint import Checkpoint
from kfac_laplace.curvature.estimate.fisher import Fisher, FisherName
from kfac_laplace.curvature.estimate.settings import KfacApprox
from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.gradients.groups import Subset
from kfac_laplace.curvature.gradients.subnetwork import GivenSubnetwork
from kfac_laplace.curvature.linalg.dtypes import FactorDtype
from kfac_laplace.curvature.model.batches import BatchFn
from kfac_laplace.curvature.model.fingerprint import Weights, fingerprint
from kfac_laplace.curvature.model.forward import ForwardFn
from kfac_laplace.curvature.options import CurvatureOptions, Offload, Uncovered
from kfac_laplace.curvature.shards import check_all_data
from kfac_laplace.curvature.spelling import suggesting
from kfac_laplace.errors import InvalidValue, NotFitted, UnsupportedUse
from kfac_laplace.keywords import Answer, LaplaceKeywords, MeanAndCovariance
from kfac_laplace.likelihoods import Likelihood, LikelihoodName
from kfac_laplace.likelihoods.answers import ShowsMean, ShowsOutputs
from kfac_laplace.likelihoods.links import Link
from kfac_laplace.migration import refused
from kfac_laplace.migration.arguments import chosen_subset, ordered
from kfac_laplace.migration.prior_search import Method
from kfac_laplace.migration.words import LaplaceTorchWords
from kfac_laplace.options import check_iterable, check_positive, check_text, check_whole
from kfac_laplace.planning.asked import asked
from kfac_laplace.planning.making import make_plan
from kfac_laplace.planning.plan import Plan
from kfac_laplace.posterior import state
from kfac_laplace.posterior.calibrate.choice import Choice
from kfac_laplace.posterior.calibrate.choice import Method as CalibrationMethod
from kfac_laplace.posterior.calibrate.prior_grid import grid_search
from kfac_laplace.posterior.calibrate.training_data import TrainingData
from kfac_laplace.posterior.carry import carried
from kfac_laplace.posterior.claims import claims, tell
from kfac_laplace.posterior.expansion import Expansion, mode_of
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import (
    Hyperparameters,
    checked_sigma,
    checked_temperature,
)
from kfac_laplace.posterior.objectives import (
    AnyObjective,
    Data,
    Evidence,
    evidence_of,
    on_data,
    resolve_objective,
)
from kfac_laplace.posterior.optimum import Search
from kfac_laplace.posterior.predict.loader import predict_loader
from kfac_laplace.posterior.predict.predictive import Predictive
from kfac_laplace.posterior.predict.predictor import Predictor, PredType
from kfac_laplace.posterior.predict.scaling import Scaling
from kfac_laplace.posterior.prior import (
    Given,
    Prior,
    checked_mean,
    given_precision,
    layouts_of,
    starting_precision,
)
from kfac_laplace.posterior.sharing import (
    PriorStructure,
    check_sharing,
    resolve_sharing,
    sharing_to_plain,
)
from kfac_laplace.posterior.steps import optimise
from kfac_laplace.pretrained import about, posterior_file, write_folder
from kfac_laplace.report import Bootstrap, Question, Report, check_suffix, compare
from kfac_laplace.states.files import File, is_safetensors, read, write
from kfac_laplace.states.plain import sealed
from kfac_laplace.states.stored import FORMAT, opened
from kfac_laplace.summary import line, lines, markup, table

log = logging.getLogger("kfac_laplace")

_NO_OPTION = {"self", "model", "subnetwork_indices", "subnetwork_mask"}


class Laplace(LaplaceTorchWords, Generic[Answer]):
    """Laplace approximation N(θ*, P⁻¹), P = H/(σ²T) + diag δ, of a trained network [REDUX21].

    Args:
        model: the network at its mode θ*; it is never changed.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        hessian_structure: "kron", "ekfac", "diag", "full", "lowrank", `LowRank(rank)`,
            or `Kron(rank)`.
        subset_of_weights: "all", "last_layer", parameter-name patterns, or a subnetwork: a boolean
            mask or int64 indices of `parameters_to_vector(model.parameters())`, or boolean masks by
            parameter name (under "diag" or "full"). Other parameters and entries stay as they are.
        kfac_approx: "auto", "expand", "reduce" or {pattern: setting}.
        fisher: "exact", "hybrid", "mc", "empirical" or an object such as `Hybrid(passes=4)`.
        prior_precision: δ, one value, one for each precision of the prior structure, or
            {pattern of parameter names: value}, of which the first that matches counts.
        prior_structure: "layerwise", "scalar", "unit", "input" or "diag" (these three not
            with "kron"), {pattern: one of them}, or a `Sharing`.
        prior_mean: μ, one value, one for each parameter, or {pattern: value}.
        sigma_noise: σ, a standard deviation; of likelihoods with a noise.
        temperature: T; low means a concentrated posterior.
        joint_bias: whether a weight and its bias share a block.
        uncovered: "diag", "error" or "freeze" for parameters that no layer rule covers.
        seed: seed of all draws inside `fit`, and after it of predictions and of the first samples
            without a generator.
        factor_dtype: precision in which curvature is summed, "auto", torch.float64 or
            torch.float32; see `Curvature`.
        dict_key_y: name of the targets where batches are mappings.
        class_axis: axis of the outputs that holds the outputs of one row, also from the end; None:
            told by the shapes, and refused where they allow two.
        forward_fn: called as `forward_fn(model, x)` to give the output, where `model(x)` does not.
        batch_fn: takes a batch of a loader to (x, y), where it is no pair and no mapping.
        memory_budget: bytes that temporary tensors may take; see `Curvature`.
        offload: "cpu" for curvature and eigenvectors that are too large for the model's device; see
            docs/devices.md.
        process_group: "world" or a group of torch.distributed, whose processes each `fit` a part of
            the data and end with the posterior of all; see docs/distributed.md.
        subnetwork_indices: laplace-torch's place for indices, with subset_of_weights="subnetwork".
        subnetwork_mask: likewise for a mask, or masks by name.

    Raises:
        InvalidValue: an option out of range.
        UnsupportedUse: a model that cannot be recorded.
    """

    @overload
    def __init__(
        self: "Laplace[MeanAndCovariance]",
        model: nn.Module,
        likelihood: ShowsOutputs,
        **options: Unpack[LaplaceKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self: "Laplace[Tensor]",
        model: nn.Module,
        likelihood: ShowsMean = "classification",
        **options: Unpack[LaplaceKeywords],
    ) -> None: ...

    @overload  # one of the two is not known beforehand
    def __init__(
        self: "Laplace[Any]",
        model: nn.Module,
        likelihood: LikelihoodName | Likelihood = "classification",
        **options: Unpack[LaplaceKeywords],
    ) -> None: ...

    @refused.answering(refused.CONSTRUCTOR)
    @suggesting
    def __init__(
        self,
        model: nn.Module,
        likelihood: LikelihoodName | Likelihood = "classification",
        *,
        hessian_structure: Structure = "kron",
        subset_of_weights: Subset | GivenSubnetwork = "all",
        kfac_approx: KfacApprox = "auto",
        fisher: FisherName | Fisher = "exact",
        prior_precision: Given = 1.0,
        prior_structure: PriorStructure = "layerwise",
        prior_mean: Given = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        joint_bias: bool = True,
        uncovered: Uncovered = "diag",
        seed: int = 0,
        factor_dtype: FactorDtype = "auto",
        dict_key_y: str = "labels",
        class_axis: int | None = None,
        forward_fn: ForwardFn | None = None,
        batch_fn: BatchFn | None = None,
        memory_budget: int | None = None,
        offload: Offload | None = None,
        process_group: Any = None,
        subnetwork_indices: Tensor | None = None,
        subnetwork_mask: GivenSubnetwork | None = None,
    ):
        self.model = model
        options = CurvatureOptions.of(
            likelihood,
            hessian_structure=hessian_structure,
            subset_of_weights=chosen_subset(subset_of_weights, subnetwork_indices, subnetwork_mask),
            kfac_approx=kfac_approx,
            fisher=fisher,
            joint_bias=joint_bias,
            uncovered=uncovered,
            seed=seed,
            factor_dtype=factor_dtype,
            class_axis=class_axis,
            forward_fn=forward_fn,
            batch_fn=batch_fn,
            memory_budget=memory_budget,
            offload=offload,
            process_group=process_group,
        )
        self._sharing = resolve_sharing(prior_structure)
        check_sharing(self._sharing, hessian_structure)
        self.curvature = Curvature.of(model, options)
        self.options = self.curvature.options
        self._structure = copy.deepcopy(prior_structure)  # the caller's mapping may change
        self._mean = checked_mean(prior_mean)
        check_text("dict_key_y", dict_key_y)
        self.dict_key_y = dict_key_y
        device = self.curvature.network.device_of_numbers
        delta, self._patterns = starting_precision(prior_precision, device)
        self._start = self._patterns or delta.detach()  # of groups that a later fit finds new
        self._hyper = Hyperparameters(
            delta,
            self._checked_sigma(sigma_noise),
            checked_temperature(temperature, device),
        )
        self._scaling = Scaling.start(device)
        self._mode: dict[str, Tensor] = {}
        self._posterior: Posterior | None = None
        self._data = self._held_out = TrainingData()
        self._said: set[str] = set()
        self._draws = Generator().manual_seed(self.seed)

    @classmethod
    def from_curvature(
        cls,
        curvature: Curvature,
        model: nn.Module,
        *,
        prior_precision: Given = 1.0,
        prior_structure: PriorStructure = "layerwise",
        prior_mean: Given = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        dict_key_y: str = "labels",
        forward_fn: ForwardFn | None = None,
        batch_fn: BatchFn | None = None,
    ) -> Self:
        """A posterior at the model's present weights by a curvature that is there, without a pass.

        All but the prior and the hyperparameters is the curvature's: likelihood, structure, groups.
        Parameters without a block stay at their values, as do norms where the curvature is that of
        `kfac_laplace.optim.KFAC`. Such a curvature knows no log-likelihood: log-determinants,
        predictions and samples are there, the evidence takes `fit`.

        Args:
            curvature: with data; merged, loaded or an optimiser's as well. It is not changed.
            model: the network at its mode.
            prior_precision: as for `Laplace`, like the following.
            prior_structure: how δ is shared.
            prior_mean: μ.
            sigma_noise: σ.
            temperature: T.
            dict_key_y: name of the targets where batches are mappings.
            forward_fn: the curvature's by default.
            batch_fn: likewise.

        Raises:
            NotFitted: a curvature of no data.
            InvalidValue: it has other parameters than the model, or a prior does not fit them.
        """
        if not curvature.blocks:
            raise NotFitted(
                "a posterior needs data", where="curvature", remedy="Call curvature.fit first"
            )
        options = dataclass_replace(
            curvature.options,
            forward_fn=forward_fn or curvature.options.forward_fn,
            batch_fn=batch_fn or curvature.options.batch_fn,
        )
        made = cls(
            model,
            options.likelihood,
            prior_precision=prior_precision,
            prior_structure=prior_structure,
            prior_mean=prior_mean,
            sigma_noise=sigma_noise,
            temperature=temperature,
            dict_key_y=dict_key_y,
            **options.keywords(),
        )
        own = Curvature.of(model, options)
        own.network.unchanged(curvature.ggn.knowledge.shapes)
        own.ggn = dataclass_replace(curvature.ggn, options=options)
        own.generator.set_state(curvature.generator.get_state())
        made._adopt(own, mode_of(own))
        return made

    @property
    def seed(self) -> int:
        """Seed of all draws inside `fit`, and of predictions without a generator."""
        return self.options.seed

    @property
    def prior_structure(self) -> PriorStructure:
        """How δ is shared, as it was given."""
        return self._structure

    @property
    def prior_mean(self) -> Given:
        """μ, as it was given."""
        return self._mean

    @property
    def likelihood(self) -> Likelihood:
        """p(y | f)."""
        return self.curvature.likelihood

    # --- fitting ---------------------------------------------------------------------------

    @refused.answering(refused.FIT)
    def fit(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        override: bool = True,
        progress_bar: bool = False,
        checkpoint: Checkpoint | str | Path | None = None,
    ) -> Self:
        """Compute the curvature at the model's present weights in one pass.

        Args:
            train_loader: any iterable of batches: pairs (x, y), or mappings with the targets under
                `dict_key_y` whose other entries go to the model by keyword.
            val_loader: held-out data, which choose κ and a temperature of predictions, as
                `calibrate` does, now, when the evidence has moved δ in `optimize_prior`, and when
                data are added. A fit that starts anew without forgets them: κ and τ that data chose
                are 1 again, those set by hand stay.
            override: start anew; False adds the data to what was seen before.
            progress_bar: show one.
            checkpoint: a path, or a `Checkpoint`, where the pass keeps what it has counted. Called
                again after the process died, with the same weights, data and options, the fit goes
                on there, to the same bits; the file is removed at its end. SIGTERM then ends the
                process after the batch at hand, which is written.

        Raises:
            InvalidValue: an empty loader, non-finite numbers, targets out of range or shape, no
                parameter with an effect on the outputs, a prior that does not fit them (said
                after the first batch), or a checkpoint that is damaged or of another fit.
            InvalidType: targets of a wrong dtype, or batches of a wrong kind.
            UnsupportedUse: a use of a parameter that cannot be treated correctly; data to be added
                to a curvature that came without their log-likelihood. After an exception the
                posterior is as it was before.
        """
        going_on = not override and bool(self._mode)
        if going_on and bool(self.curvature.statistic.isnan().any()):
            raise UnsupportedUse(
                "a curvature without the log-likelihood of its data cannot be added to",
                where="fit(override=False)",
                remedy="Call fit(train_loader) over all data",
            )
        curvature = self.curvature.copy() if going_on else self._afresh()
        kept = Checkpoint.of(checkpoint, self.options.ranks)
        curvature.read(
            train_loader,
            key_y=self.dict_key_y,
            progress=progress_bar,
            check=lambda: self._given_to(self._prior_of(curvature)),
            checkpoint=kept,
        ).finish().decompose()
        mode = mode_of(curvature)
        if not override and any(not torch.equal(mode[n], v) for n, v in self._mode.items()):
            log.warning("the weights moved since the last fit: its curvature is kept as it was")
        before = dict(vars(self))
        try:
            self._adopt(curvature, mode)
            self._data = self._data.with_loader(train_loader, override)
            if self.options.ranks is not None:  # a part of the data, of which nothing can be made
                self._data = TrainingData()
            if val_loader is not None:
                self.calibrate(val_loader, "validation")
            else:
                self._scaled_by(self._choice.after_fit(afresh=not going_on))
        except BaseException:  # held-out data may be wrong
            vars(self).update(before)
            raise
        if kept is not None:
            kept.ended()
        return self

    def plan(
        self,
        x: Any,
        y: Tensor | None = None,
        *,
        n_data: int | None = None,
        rate: float | None = None,
    ) -> Plan:
        """What a fit will take: passes, operations, bytes, seconds; nothing is fitted or changed.

        Operations and bytes are counted by running one batch through the code of a fit on shapes
        alone, without memory or numbers. Seconds are those of each part on a few examples, here
        and now; on the meta device, or with a rate, they are operations over a rate. docs/scale.md
        says how far they have been from what came then.

        Args:
            x: inputs of one batch; or, without y, a batch as a loader yields it, or a loader,
                whose first batch counts.
            y: targets of the batch.
            n_data: examples that the fit will have; by default those of the loader's data set, or
                of the batch.
            rate: floating-point operations a second in float32, of another device than this one;
                those in float64 count twice. None: measured.

        Raises:
            InvalidValue: an empty batch or loader, or one that can be read only once; n_data or a
                rate below what there can be; a batch without numbers for a model with them.
            UnsupportedUse: as `fit`; on the meta device also a model that asks for values.
        """
        found = asked(x, y, n_data, self.dict_key_y, self.options.batch_fn)
        if rate is not None:
            check_positive("rate", rate)
        return make_plan(self._afresh(), found.x, found.y, found.n_data, rate)

    def _afresh(self) -> Curvature:
        """A curvature of no data, which knows of the model's rows what the last one knew."""
        afresh, known = Curvature.of(self.model, self.options), self.curvature.ggn.knowledge
        if known.shapes.items() <= afresh.network.shapes.items():
            if self._mode:
                return afresh.remember(known.unchecked())
            return afresh.remember(known, self.curvature.settings)
        return afresh

    def _adopt(
        self,
        curvature: Curvature,
        mode: dict[str, Tensor],
        stored: Hyperparameters | None = None,
        sharing: str | None = None,
    ) -> None:
        """Take a finished curvature and mode; nothing is stored unless everything fits.

        Hyperparameters and their sharing, where given, are those of a state; else today's go on.
        """
        prior = self._prior_of(curvature)
        if sharing is not None:
            state.check_same_sharing(prior, sharing)
        hyper = (stored or self._hyper).to(curvature.network.device)
        delta = self._given_to(prior) if stored is None else prior.full(hyper.prior_precision)
        hyper = dataclass_replace(hyper, prior_precision=delta)
        self._posterior = Posterior(Expansion(curvature.network, curvature.ggn, mode, prior), hyper)
        self._patterns = None
        self.curvature, self._mode, self._hyper = curvature, mode, hyper
        self._draws = Generator().manual_seed(self.seed)

    def _prior_of(self, curvature: Curvature) -> Prior:
        """The prior over the groups of a curvature."""
        layouts = layouts_of(curvature.groups, curvature.params)
        return Prior.of(self._sharing, layouts, self.prior_mean, curvature.network.device)

    def _given_to(self, prior: Prior) -> Tensor:
        """δ as the next fit takes it: as it was given, or from the groups of the last fit by name.

        Raises:
            InvalidValue: what was given does not fit the groups, or has no value for new ones.
        """
        hyper = self._hyper.to(prior.device)
        before = None if self._posterior is None else self._posterior.prior
        if before is None or before.layouts.in_same_order(prior.layouts):
            return prior.resolve(self._patterns or hyper.prior_precision)
        return carried(hyper, before, prior, self._start)[0].prior_precision

    @property
    def posterior(self) -> Posterior:
        """The fitted posterior at today's hyperparameters, or `NotFitted`."""
        if self._posterior is None:
            raise NotFitted("there is no posterior yet", where="Laplace", remedy="Call fit first")
        if self._posterior.ggn is not self.curvature.ggn:  # merged or accumulated by the caller
            self._adopt(self.curvature, self._mode)
        return self._posterior

    # --- hyperparameters and evidence ------------------------------------------------------

    @property
    def prior_precision(self) -> Tensor:
        """δ, float64: as given before `fit`, one value for each precision after it.

        Raises:
            NotFitted: before `fit`, where δ was given by patterns.
        """
        if self._patterns is not None:
            raise NotFitted(
                "which precisions the patterns set shows only when the model is used",
                where="prior_precision",
                remedy="Call fit first",
            )
        return self._hyper.prior_precision

    @prior_precision.setter
    def prior_precision(self, value: Given) -> None:
        device = self.curvature.network.device
        given = given_precision(value, device)
        if self._posterior is not None:
            self._move(prior_precision=self._posterior.prior.resolve(given))
        else:
            delta, self._patterns = starting_precision(value, device)
            self._move(prior_precision=delta)
        self._starts_at(given)

    @property
    def sigma_noise(self) -> Tensor:
        """σ, float64, shape ()."""
        return self._hyper.sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._move(sigma_noise=self._checked_sigma(value))

    @property
    def temperature(self) -> Tensor:
        """T, float64, shape ()."""
        return self._hyper.temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        self._move(temperature=checked_temperature(value, self.curvature.network.device))

    @property
    def posterior_scale(self) -> Tensor:
        """κ ≥ 0, which multiplies the covariance of predictives and never enters the evidence."""
        return self._scaling.scale

    @posterior_scale.setter
    def posterior_scale(self, value: float | Tensor) -> None:
        self._scaling = self._scaling.with_scale(value)

    @property
    def predictive_temperature(self) -> Tensor:
        """τ > 0, by which predictions divide logits; it never enters the evidence."""
        return self._scaling.temperature

    @predictive_temperature.setter
    def predictive_temperature(self, value: float | Tensor) -> None:
        self._scaling = self._scaling.with_temperature(value, self.likelihood)

    @property
    def n_data(self) -> int:
        """Number of examples seen by `fit`."""
        return self.curvature.n_data

    @property
    def coverage(self) -> dict[str, str]:
        """How each parameter is treated.

        "kron", "ekfac", "diag", "dense", "lowrank", "frozen" or "unused". Unused parameters are in
        the posterior, which is their prior: no output depends on them.
        """
        return self.curvature.coverage

    def log_marginal_likelihood(
        self,
        prior_precision: Given | None = None,
        sigma_noise: float | Tensor | None = None,
    ) -> Tensor:
        """Laplace evidence log q(D), differentiable in both arguments; no data pass [ML21, eq. 6].

        Values passed in are kept, detached, as the hyperparameters.

        Args:
            prior_precision: δ, one value, one for each precision, or {pattern: value}.
            sigma_noise: σ, of likelihoods with a noise.

        Returns:
            A float64 scalar: the sum over all examples, positions and outputs.
        """
        posterior = self.posterior
        given: dict[str, Tensor] = {}
        if prior_precision is not None:
            delta = given_precision(prior_precision, posterior.device)
            given["prior_precision"] = posterior.prior.resolve(delta)
        if sigma_noise is not None:
            given["sigma_noise"] = self._checked_sigma(sigma_noise)
        hyper = dataclass_replace(posterior.hyperparameters, **given)
        value = posterior.at(hyper).log_marginal_likelihood
        self._move(**{name: tensor.detach() for name, tensor in given.items()})
        if prior_precision is not None:
            self._starts_at(delta)
        return value

    def evidence(
        self, objective: str | AnyObjective = "exact", *, loader: Iterable[Any] | None = None
    ) -> Evidence:
        """The evidence at today's hyperparameters with what brackets it, as an objective has it.

        Args:
            objective: "exact", "columns" or "bounds", which look at the training data once more,
                or "kron", by the posterior's own curvature.
            loader: training data; by default what `fit` read.

        Raises:
            InvalidValue: no training data, or more than the objective takes.
        """
        return evidence_of(self.posterior, objective, self._data_from(loader))

    @property
    def log_likelihood(self) -> Tensor:
        """log p(D | θ*, σ), a sum, before division by T."""
        return self.posterior.log_likelihood

    @property
    def log_det_ratio(self) -> Tensor:
        """log det P − log det P₀."""
        return self.posterior.log_det_ratio

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """log det P."""
        return self.posterior.log_det_posterior_precision

    @property
    def scatter(self) -> Tensor:
        """(θ* − μ)ᵀ P₀ (θ* − μ)."""
        return self.posterior.scatter

    def optimize_prior(
        self,
        method: Method = "marglik",
        *,
        objective: str | AnyObjective = "auto",
        val_loader: Iterable[Any] | None = None,
        loader: Iterable[Any] | None = None,
        fix_sigma_noise: bool = False,
        n_steps: int = 500,
        tolerance: float = 1e-5,
        grid: Iterable[float] | None = None,
    ) -> Self:
        """Choose δ, and σ if there is one; without a pass over the data on cached eigenvalues.

        What is maximised leaves out the scatter of parameters without effect on the outputs, whose
        integral over the prior is 1: `log_marginal_likelihood`, which has it, may fall where they
        share a precision.

        Args:
            method: "marglik" maximises the objective by L-BFGS, "mackay" the evidence by a fixed
                point; "gridsearch" takes the scalar δ of least validation NLL.
            objective: "auto" or "kron" for the evidence; "exact", "columns" or "bounds" for that of
                the exact curvature, with a pass over the training data; or a function of a
                `Posterior`.
            val_loader: validation data, for "gridsearch".
            loader: training data, for objectives that need them; by default what `fit` read.
            fix_sigma_noise: leave σ alone.
            n_steps: most iterations. A warning is logged where they do not suffice.
            tolerance: largest component of the gradient, in nats per unit of log δ or log σ.
            grid: candidates for "gridsearch"; 10⁻⁴ … 10⁴ by default.

        Raises:
            InvalidValue: an unknown method or objective, or two that do not go together; a
                tolerance that is not positive.
        """
        check_whole("n_steps", n_steps, 1)
        check_positive("tolerance", tolerance)
        chosen, posterior = resolve_objective(objective), self.posterior
        if method == "gridsearch":
            if objective != "auto":
                raise InvalidValue(
                    "a grid search has an objective of its own, the validation NLL",
                    where="objective",
                    got=repr(objective),
                    remedy="Leave it out, or use method='marglik'",
                )
            return self._on_grid(val_loader, grid)
        fixed = ("sigma_noise",) if fix_sigma_noise else ()
        free = Hyperparameters.tuned(self.likelihood, fixed)
        goal = on_data(chosen, posterior, self._data_from(loader))
        search = Search(goal, free, n_steps, tolerance)
        found = optimise(posterior, method, search)
        values = found.hyperparameters.values().items()
        self._move(**{name: value for name, value in values if name in free})
        tell(claims(self.posterior, found.bounds), set())
        return self._scaled_by(self._choice.again())

    def _on_grid(self, val_loader: Iterable[Any] | None, *args: Any, **options: Any) -> Self:
        """δ of least validation NLL, but for parameters without effect; as for `grid_search`."""
        delta = grid_search(self._choice, val_loader, *args, **options)
        kept = self._hyper.prior_precision.detach()
        self._move(prior_precision=delta.where(~self.posterior.unused_precisions, kept))
        return self

    def _data_from(self, loader: Iterable[Any] | None) -> Data:
        """The training data: a loader, or those that `fit` read."""
        if loader is not None:
            check_iterable("loader", loader)
            check_all_data(self.options.process_group, loader, "loader")
        loaders = self._data.loaders if loader is None else (loader,)
        return Data(loaders, self.dict_key_y, self.options.seed)

    def calibrate(
        self, loader: Iterable[Any] | None = None, method: CalibrationMethod = "auto"
    ) -> Self:
        """Choose `posterior_scale` κ, and with held-out data `predictive_temperature` τ as well.

        Held-out data choose both by the predictive NLL, with log τ ~ N(0, ½²) so that few of them
        do no harm; τ is for classification and binary. By leave-one-out κ alone is chosen, by the
        probit link and under a τ set by hand, and stays, with a warning, where the left-out NLL is
        worse than that of a constant prediction or the best κ is an end of the range.

        Args:
            loader: held-out data; for "loo" the training data, by default what `fit` read.
            method: "validation" predicts held-out data; "loo" predicts each training point without
                itself, linearised; "auto" is "validation" where a loader is given that does not
                yield the data of the fit, else "loo".
        """
        return self._scaled_by(self._choice.by(loader, method))

    @property
    def _choice(self) -> Choice:
        loaders = self._data, self._held_out
        return Choice(self.posterior, self._scaling, *loaders, self.dict_key_y, self.seed)

    def _scaled_by(self, choice: Choice) -> Self:
        self._scaling, self._held_out = choice.scaling, choice.held_out
        return self

    # --- predictions -----------------------------------------------------------------------

    @property
    def _predictor(self) -> Predictor:
        return Predictor(self.posterior, self._scaling, self.seed, self.dict_key_y, self._said)

    @overload
    def __call__(
        self,
        x: Any,
        pred_type: PredType = "glm",
        link_approx: Link = "auto",
        joint: Literal[False] = False,
        n_samples: int = 100,
        generator: Generator | None = None,
        *,
        enable_backprop: bool = False,
    ) -> Answer: ...

    @overload
    def __call__(
        self,
        x: Any,
        pred_type: PredType = "glm",
        link_approx: Link = "auto",
        *,
        joint: Literal[True],
        n_samples: int = 100,
        generator: Generator | None = None,
        enable_backprop: bool = False,
    ) -> MeanAndCovariance: ...

    @overload  # by position, in either order; or a joint that is not known beforehand
    def __call__(
        self,
        x: Any,
        pred_type: PredType = "glm",
        link_approx: Link | bool = "auto",
        joint: Link | bool = False,
        n_samples: int = 100,
        generator: Generator | None = None,
        *,
        enable_backprop: bool = False,
    ) -> Any: ...

    @refused.answering(refused.CALL)
    def __call__(
        self,
        x: Any,
        pred_type: PredType = "glm",
        link_approx: Link | bool = "auto",
        joint: Link | bool = False,
        n_samples: int = 100,
        generator: Generator | None = None,
        *,
        enable_backprop: bool = False,
    ) -> Any:
        """Predict at inputs x.

        Args:
            x: inputs as `fit` takes them.
            pred_type: "glm" (closed form), "linear" (linearised samples) or "nn" (weight samples).
            link_approx: "probit", "bridge" or "mc", for "glm" classification. By position the two
                may come the other way round.
            joint: regression with "glm": one mean (N·C,) and covariance (N·C, N·C) over all inputs.
            n_samples: samples for "mc", "linear" and "nn".
            generator: their source; by default a fresh one seeded with `seed`.
            enable_backprop: stay in the graph of x, and of parameters outside the posterior.

        Returns:
            Classification and binary: probabilities, shaped like the output. Regression (rewards):
            the mean (N, C) and the covariance (N, C, C) without noise. Other likelihoods: E[y].
        """
        link_approx, joint = ordered(link_approx, joint)
        if joint:
            return self._predictor.joint(x, pred_type, enable_backprop)
        if not self.likelihood.shows_outputs:
            return self._predictor.expected(
                x, pred_type, link_approx, n_samples, generator, enable_backprop
            )
        predictive = self.predict(
            x, pred_type, link_approx, n_samples, generator, enable_backprop=enable_backprop
        )
        return predictive.output_mean, predictive.covariance

    def predict(
        self,
        x: Any,
        pred_type: PredType = "glm",
        link_approx: Link = "auto",
        n_samples: int = 100,
        generator: Generator | None = None,
        *,
        enable_backprop: bool = False,
    ) -> Predictive:
        """The predictive as an object: mean, covariance, probabilities, entropy, information.

        Arguments as for calling the posterior.
        """
        return self._predictor.predict(
            x, pred_type, link_approx, n_samples, generator, enable_backprop
        )

    def predict_loader(
        self,
        loader: Iterable[Any],
        pred_type: PredType = "glm",
        link_approx: Link = "auto",
        n_samples: int = 100,
        generator: Generator | None = None,
        *,
        progress_bar: bool = False,
    ) -> Predictive:
        """What `predict` gives at all inputs of a loader together, batch by batch.

        The loader yields inputs alone, pairs with targets, mappings, graphs, or what `batch_fn`
        takes. Other arguments as for calling the posterior.

        With a process group, and a loader with a `DistributedSampler`, all processes call this:
        each predicts its part, and all have the predictions of all, in the order of the data set.

        Raises:
            InvalidValue: no batch, or batches whose outputs differ in more than their number.
        """
        return predict_loader(
            self._predictor, loader, pred_type, link_approx, n_samples, generator, progress_bar
        )

    def report(
        self,
        loader: Iterable[Any],
        path: str | Path | None = None,
        *,
        val_loader: Iterable[Any] | None = None,
        ood_loader: Iterable[Any] | None = None,
        resamples: int = 1000,
        level: float = 0.95,
    ) -> Report:
        """Scores on a loader of the network, temperature scaling and the posterior, side by side.

        Args:
            loader: test data.
            path: where to write the report: .json, .html, .png, .pdf or .svg.
            val_loader: held-out data for temperature scaling; by default those that chose κ and τ.
            ood_loader: strange inputs, for AUROC and FPR95 of telling them; targets beside them do
                not matter.
            resamples: number of resamples of the examples, by which scores have intervals and
                differences to the network; drawn by `seed`. 0 for none.
            level: probability of the intervals.

        Returns:
            Tables and pictures. Classification and binary: accuracy, NLL, ECE, Brier score, AURC,
            mean confidence; else NLL, and of numbers RMSE, CRPS, the share of targets in 50, 90 and
            95 % intervals and the width of the second. Without a Gaussian noise intervals and CRPS
            are by 999 draws.

        Raises:
            InvalidValue: no batch, no label that counts, predictions that are not finite, another
                suffix of the path; an option out of range.
            MissingPackage: pictures without matplotlib.
        """
        if path is not None:
            check_suffix(path)
        for data in (loader, ood_loader):
            if data is not None:
                check_all_data(self.options.process_group, data, "report")
        choice = self._choice
        asked = Question(
            loader,
            val_loader,
            ood_loader,
            Bootstrap(resamples, level, self.seed),
            repr(self),
            lines(choice.posterior, self.coverage),
        )
        found = compare(choice, asked)
        if path is not None:
            found.save(path)
        return found

    def summary(self) -> str:
        """A table: for each group parameters, treatment, setting, δ, γ, memory; then the evidence.

        Raises:
            NotFitted: before `fit`.
        """
        posterior = self.posterior
        return table(repr(self), posterior, lines(posterior, self.coverage))

    def __repr__(self) -> str:
        """Likelihood, structure, examples, parameters and κ, on one line."""
        return line(self.curvature, self._scaling, fitted=self._posterior is not None)

    def _repr_html_(self) -> str:
        """The summary for notebooks, short; before `fit` the line alone."""
        posterior = None if self._posterior is None else self.posterior
        groups = () if posterior is None else lines(posterior, self.coverage)
        return markup(repr(self), posterior, groups)

    # --- state -----------------------------------------------------------------------------

    def state_dict(self, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Tensors and plain data: options, curvature, mode and hyperparameters, with a checksum.

        Args:
            dtype: as for `save`.
        """
        posterior = self.posterior
        content = {
            "format": FORMAT,
            "options": self._plain_options(),
            "curvature": self.curvature.state_dict(dtype=dtype),
            "mode": dict(self._mode),
            "sharing": posterior.prior.digest,
            "hyperparameters": asdict(posterior.hyperparameters.detached()),
            **state.scaling_to_plain(self._scaling),
            "model": fingerprint(self.curvature.network.model, self._mode),
        }
        return sealed(content)

    def _plain_options(self) -> dict[str, Any]:
        return {
            **self.options.to_plain(),
            "prior_structure": sharing_to_plain(self.prior_structure),
            "prior_mean": self.prior_mean,
            "dict_key_y": self.dict_key_y,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, weights: Weights = "check") -> None:
        """Take over a state made with the same options on the same weights.

        Hyperparameters, κ, curvature and mode are the state's; seed, factor_dtype, memory_budget,
        offload, process_group, forward_fn, batch_fn and dict_key_y stay this posterior's own.

        Args:
            state_dict: the state.
            weights: as for `load`.

        Raises:
            InvalidValue: a state of another kind, version, structure, model or of other weights, a
                damaged or changed one; nothing is changed then.
        """
        remedy = "Make it with the stored options, as Laplace.load does"
        self._take_state(state_dict, remedy, weights)

    def _take_state(self, state_dict: Mapping[str, Any], remedy: str, weights: Weights) -> None:
        """Take over a state; the remedy is for options other than the stored ones."""
        own = self._plain_options()
        with torch.inference_mode(False):  # as `files.read`
            found = state.restored(state_dict, self.model, self.options, own, remedy, weights)
        self._adopt(found.curvature, found.mode, found.hyperparameters, found.sharing)
        self._scaling, self._data, self._held_out = found.scaling, TrainingData(), TrainingData()
        delta = self._hyper.prior_precision
        if bool((delta == delta[0]).all()):
            self._starts_at(delta[:1])

    def save(self, path: File, *, dtype: torch.dtype | None = None) -> None:
        """Write `state_dict()` to a file: as safetensors by the suffix, else as torch.save does.

        It is written as a whole or not at all: after a failure the path holds what it held before.
        A .safetensors file has every bit in less room, and a header in JSON.

        Args:
            path: where to, such as posterior.safetensors, or a file open for bytes, which is
                written as torch.save does.
            dtype: torch.float32 to round curvature to it in a .safetensors file, which takes half
                the room; docs/saving.md says what that costs.

        Raises:
            NotFitted: before `fit`.
            InvalidValue: a dtype that is no such, or beside a file that is not .safetensors.
            MissingPackage: a .safetensors file, and that package is not installed.
            OSError: the folder does not exist or is full, the path is a folder or not writable.
        """
        if dtype is not None and not is_safetensors(path):
            raise InvalidValue(
                "curvature is rounded in .safetensors files alone",
                where="dtype",
                got=f"{dtype} beside {path}",
                remedy="Save to a path that ends in .safetensors, or leave dtype out",
            )
        write(self.state_dict(dtype=dtype), path, self._about())

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write posterior.safetensors, config.json and README.md, as the Hugging Face Hub has them.

        A README.md that is there stays. The model's own weights are not in it.

        Args:
            folder: made where it is not there.
            dtype: as for `save`.

        Raises:
            InvalidValue: the folder has a config.json of another library.
        """
        write_folder(folder, self.state_dict(dtype=dtype), self._about())

    def _about(self) -> dict[str, Any]:
        return about(self.curvature, self.posterior, self._scaling)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module, *, weights: Weights = "check", **overrides: Any
    ) -> Self:
        """Read the posterior of a folder that `save_pretrained` made.

        Args:
            folder: on this machine: `huggingface_hub.snapshot_download` fetches one.
            model: as for `load`, like the following.
            weights: whether the model's weights have to be those of the fit.
            overrides: options.

        Raises:
            InvalidValue: no such folder, and as for `load`.
        """
        return cls.load(posterior_file(folder), model, weights=weights, **overrides)

    @classmethod
    def load(
        cls, path: File, model: nn.Module, *, weights: Weights = "check", **overrides: Any
    ) -> Self:
        """Read a saved posterior for a model that holds the weights of the fit.

        Args:
            path: file made by `save`, or such a file open for bytes, of whichever format. It is
                read as plain data: nothing in it is run.
            model: the network, with its weights loaded.
            weights: "check" that parameters and buffers are those of the fit; or "ignore" their
                values: the posterior is around the stored mean, at which the model is run, with
                buffers and frozen weights as they are in the model.
            overrides: options that the file cannot hold, such as a likelihood of your own, and
                those that do not bind its numbers: seed, factor_dtype, memory_budget,
                offload, process_group, forward_fn, batch_fn and dict_key_y. Others may be given if
                they are the file's; hyperparameters are set after loading.

        Raises:
            FileNotFoundError: no such file.
            InvalidValue: a file of another kind or version, a damaged one, one that belongs to
                another model or other weights, or an override that contradicts it.
            InvalidType: an override that is no option of `Laplace`.
            MissingPackage: a .safetensors file, and that package is not installed.
        """
        names = state.keywords_of(cls.__mro__[: cls.__mro__.index(Laplace) + 1])
        state.check_names(overrides, names - _NO_OPTION | {"weights"})
        stored = read(path)
        found = opened(stored, state.KEYS, "a Laplace posterior", *state.LATER)
        keywords = state.options_from_state(found["options"], overrides)
        loaded = cls(model, keywords.pop("likelihood"), **keywords)
        loaded._take_state(stored, "Leave it out: the file decides it", weights)
        return loaded

    # --- checks ----------------------------------------------------------------------------

    def _checked_sigma(self, value: float | Tensor) -> Tensor:
        return checked_sigma(value, self.likelihood, self.curvature.network.device_of_numbers)

    def _starts_at(self, given: Tensor | dict[str, float]) -> None:
        """Where later fits start new groups: at one number, or patterns, that the user gave."""
        if not isinstance(given, Tensor) or given.numel() == 1 or self._posterior is None:
            self._start = given.detach() if isinstance(given, Tensor) else given

    def _move(self, **changed: Tensor) -> None:
        """Store changed hyperparameters here and in the posterior."""
        self._hyper = dataclass_replace(self._hyper, **changed)
        if self._posterior is not None:
            self._posterior = self.posterior.at(self._hyper)
