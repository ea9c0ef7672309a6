"""`MarglikTuner`: optimises hyperparameters by the Laplace evidence during training [ML21, Alg. 1].

The caller keeps the training loop. The tuner supplies the loss at today's hyperparameters and,
every few epochs, one curvature pass and some steps on log δ and log σ.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kfac_laplace.curvature.estimate.blocks import Structure
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.forward import Forward
from kfac_laplace.curvature.options import CurvatureKeywords, CurvatureOptions, spelled
from kfac_laplace.curvature.state import (
    groups_from_plain,
    groups_to_plain,
    knowledge_of_groups,
)
from kfac_laplace.errors import InvalidValue, NotFitted
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.marglik.live import LiveParameters
from kfac_laplace.marglik.loss import looked_at, mean_log_likelihood, undivided_prior
from kfac_laplace.marglik.record import Record
from kfac_laplace.options import check_choice, check_positive, check_whole
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.mackay import check_objective, mackay_steps
from kfac_laplace.posterior.objectives import Objective, resolve_objective
from kfac_laplace.posterior.prior import (
    Given,
    Prior,
    checked_mean,
    layouts_of,
    starting_precision,
)
from kfac_laplace.posterior.sharing import PriorStructure, resolve_sharing, sharing_to_plain
from kfac_laplace.posterior.state import check_options, check_same_sharing, refusing_damage
from kfac_laplace.posterior.steps import adam

log = logging.getLogger("kfac_laplace")

METHODS = ("marglik", "mackay")


class MarglikTuner:
    """Tunes prior precisions, and the noise of regression, by the evidence while you train.

    Args:
        model: the network in training; never changed, its mode and optimiser are the caller's.
        likelihood: "classification" or another name of docs/likelihoods.md, or a `Likelihood`.
        n_data: number of training examples (of nodes, where each node has an output), by which the
            loss weighs the prior.
        prior_structure: how δ is shared; as for `Laplace`, with all its forms.
        prior_precision: initial δ; as for `Laplace`.
        prior_mean: μ; as for `Laplace`.
        sigma_noise: initial σ, of likelihoods with a noise.
        temperature: T, the same in the loss and in the posterior.
        fix_sigma_noise: leave σ alone.
        kfac_approx: as for `Laplace`; so are fisher, hessian_structure, subset_of_weights,
            joint_bias, uncovered, seed, factor_dtype, memory_budget, dict_key_y, forward_fn and
            batch_fn.
        n_epochs_burnin: no round before this epoch (epochs count from 1).
        marglik_frequency: a round in every epoch that is a multiple of it.
        n_hypersteps: steps in each round.
        lr_hyp: Adam's learning rate on log δ and log σ ("marglik").
        method: "marglik" for Adam on the objective, "mackay" for the evidence's fixed point.
        objective: what rounds maximise: "auto" or "kron" for the evidence, or a function of a
            `Posterior`. Records hold the evidence beside it.

    Raises:
        InvalidValue: an option out of range.
    """

    @spelled
    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood,
        n_data: int,
        *,
        prior_structure: PriorStructure = "layerwise",
        prior_precision: Given = 1.0,
        prior_mean: Given = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        fix_sigma_noise: bool = False,
        hessian_structure: Structure = "kron",
        dict_key_y: str = "labels",
        n_epochs_burnin: int = 0,
        marglik_frequency: int = 1,
        n_hypersteps: int = 10,
        lr_hyp: float = 0.1,
        method: str = "marglik",
        objective: str | Objective = "auto",
        **options: Unpack[CurvatureKeywords],
    ):
        at_least = {
            "n_data": (n_data, 1),
            "n_epochs_burnin": (n_epochs_burnin, 0),
            "marglik_frequency": (marglik_frequency, 1),
            "n_hypersteps": (n_hypersteps, 1),
        }
        for name, (value, least) in at_least.items():
            check_whole(name, value, least)
        check_positive("lr_hyp", lr_hyp)
        check_choice("method", method, METHODS)
        self.objective = resolve_objective(objective)
        if method == "mackay":
            check_objective(self.objective)
        self.model = model
        self.n_data = n_data
        self.n_epochs_burnin, self.marglik_frequency = n_epochs_burnin, marglik_frequency
        self.n_hypersteps, self.lr_hyp, self.method = n_hypersteps, lr_hyp, method
        self._fixed: dict[str, Any] = {
            "prior_structure": copy.deepcopy(prior_structure),
            "prior_mean": checked_mean(prior_mean),
            "dict_key_y": dict_key_y,
        }
        blank = Laplace(
            model,
            likelihood,
            hessian_structure=hessian_structure,
            prior_precision=prior_precision,
            sigma_noise=sigma_noise,
            temperature=temperature,
            **self._fixed,
            **options,
        )
        self.options = blank.options
        self.likelihood = blank.likelihood
        self._network, self._known = blank.curvature.network, blank.curvature.ggn.knowledge
        self._penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
        self._live: LiveParameters
        delta, self._patterns = starting_precision(prior_precision, self._network.device)
        self._take(Hyperparameters(delta, blank.sigma_noise, blank.temperature))
        fixed = ("sigma_noise",) if fix_sigma_noise else ()
        self._free = Hyperparameters.tuned(self.likelihood, fixed)
        self._adam: dict[str, Any] | None = None
        self._prior: Prior | None = None
        self._epoch = 0
        self.history: list[Record] = []

    # --- the loss ----------------------------------------------------------------------------

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Negative log joint per example: (1/B) Σ −log p(y|f, σ)/T + (1/2N) Σ δ(θ − μ)².

        Log-likelihoods are sums over positions and outputs; hyperparameters are detached.

        Args:
            output: what the model returned for a batch of B examples.
            target: its targets.

        Raises:
            InvalidValue: targets of a wrong shape or range.
            InvalidType: targets of a wrong dtype.
        """
        hyper = self._hyper
        fit = mean_log_likelihood(self.likelihood, output, target, hyper.sigma_noise)
        self._known = looked_at(self._known, self.likelihood, output, target)
        if self._penalty is None:
            prior = self._prior or self._first_prior()
            self._live = LiveParameters(self._network.model, prior.layouts.params)
            self._penalty = prior.penalty(hyper.prior_precision / (2 * self.n_data))
        return -1 / self._temperature * fit + self._penalty(self._live()).to(fit.dtype)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's output on a batch of a loader, in the model's present mode, and its targets.

        Args:
            batch: a pair (x, y), a mapping with targets, graphs, or what `batch_fn` takes.
        """
        x, y = split_batch(batch, self._key_y, self.options.batch_fn)
        # Through wrappers, as the caller trains it: data parallelism averages gradients in them.
        run = Forward(self.model, self.options.forward_fn)
        return run(self._network.batch(x, len(y)).x), y

    def _first_prior(self) -> Prior:
        """The prior before a batch was seen: all parameters share one precision, or an error."""
        options, mean = self.options, self._fixed["prior_mean"]
        several = self._patterns is not None or self._hyper.prior_precision.numel() > 1
        several |= not isinstance(mean, Mapping) and torch.as_tensor(mean).numel() > 1
        partial = options.subset_of_weights == "last_layer" or options.uncovered == "freeze"
        if several or partial:
            raise InvalidValue(
                "which parameters belong to which precision shows only when the model is used",
                where="prior_precision",
                got="a loss before the first batch was seen",
                remedy="Call tuner.prepare(loader) once before training",
            )
        return undivided_prior(self._network, self._known.tracked, mean)

    def prepare(self, loader: Iterable[Any]) -> None:
        """Learn the groups of parameters from a loader's first batch, before the first round.

        Needed only where the loss cannot know before it which precision pulls which parameter:
        several initial precisions or means (means by pattern excepted), "last_layer", or
        uncovered="freeze".
        """
        curvature = self._blank().curvature
        curvature.fit([*islice(loader, 1)], key_y=self._key_y)
        known = curvature.ggn.knowledge
        prior, hyper = self._prior_of(known), self._hyper
        if self._patterns is not None:
            hyper = replace(hyper, prior_precision=prior.resolve(self._patterns))
        self._known, self._prior, self._patterns = known, prior, None
        self._take(hyper)

    @property
    def _key_y(self) -> str:
        return str(self._fixed["dict_key_y"])

    # --- the rounds --------------------------------------------------------------------------

    def step(self, loader: Iterable[Any] | None = None, epoch: int | None = None) -> Record | None:
        """After an epoch: where a round is due, one curvature pass and hyperparameter steps.

        Args:
            loader: training data; read only when a round is due.
            epoch: number of the epoch, from 1; counted by the tuner where it is left out.

        Returns:
            The round's record, or None.

        Raises:
            InvalidValue: a round is due and there is no loader, or the data are bad. Nothing is
                changed then, the epoch count included.
        """
        epoch = self._epoch + 1 if epoch is None else epoch
        if epoch < self.n_epochs_burnin or epoch % self.marglik_frequency:
            self._epoch = epoch
            return None
        if loader is None:
            raise InvalidValue(
                "a round is due in this epoch",
                where="loader",
                got=None,
                remedy="Pass the training loader",
            )
        start = time.perf_counter()
        # Another seed each round, so that Monte-Carlo labels are not the same ones again.
        la = self._blank(self.options.seeded(self.options.seed + epoch)).fit(loader)
        if la.curvature.n_rows != self.n_data and not self.history:
            log.warning(
                "the loader holds %d examples where n_data=%d was promised: the loss weighs the "
                "prior by n_data",
                la.curvature.n_rows,
                self.n_data,
            )
        self._synchronise()
        curvature_seconds = time.perf_counter() - start
        hyper, moments = self._improved(la.posterior)
        with torch.no_grad():
            record = Record.of(
                la.posterior.at(hyper),
                self.objective,
                epoch=epoch,
                seconds=(time.perf_counter() - start, curvature_seconds),
            )
        known, prior = la.curvature.ggn.knowledge, la.posterior.prior
        self._known, self._prior, self._patterns = known, prior, None
        self._take(hyper)
        self._adam, self._epoch = moments, epoch
        self.history.append(record)
        return record

    def _take(self, hyper: Hyperparameters) -> None:
        """Make them today's, with what the loss needs of them."""
        self._hyper = hyper.detached()
        self._temperature = float(hyper.temperature)
        self._penalty = None

    def _blank(self, options: CurvatureOptions | None = None) -> Laplace:
        """An unfitted posterior at today's hyperparameters, with other options if any."""
        blank = Laplace(
            self.model,
            self.likelihood,
            prior_precision=self._patterns or self._hyper.prior_precision,
            sigma_noise=self._hyper.sigma_noise,
            temperature=self._temperature,
            **self._fixed,
            **(options or self.options).keywords(),
        )
        blank.curvature.remember(self._known)
        return blank

    def _synchronise(self) -> None:
        """Wait for the device, so that the clock tells the pass from the steps."""
        if self._network.device.type == "cuda":
            torch.cuda.synchronize(self._network.device)

    def _prior_of(self, known: Knowledge) -> Prior:
        sharing = resolve_sharing(self._fixed["prior_structure"])
        layouts = layouts_of(known.groups, known.params)
        return Prior.of(sharing, layouts, self._fixed["prior_mean"], self._network.device)

    def _improved(self, posterior: Posterior) -> tuple[Hyperparameters, dict[str, Any] | None]:
        """The hyperparameters after this round's steps, and Adam's state after them."""
        if self.method == "mackay":
            return mackay_steps(posterior, self._free, self.n_hypersteps), None
        return adam(
            posterior,
            self.objective,
            self._free,
            n_steps=self.n_hypersteps,
            lr=self.lr_hyp,
            state=self._adam,
        )

    # --- results -----------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Tensor]:
        """Today's values, detached, float64: δ, and σ of likelihoods with a noise, by name.

        Raises:
            NotFitted: δ was given by patterns, and no batch was seen yet.
        """
        if self._patterns is not None:
            raise NotFitted(
                "which precisions the patterns set shows only when the model is used",
                where="prior_precision",
                remedy="Call tuner.prepare(loader) first",
            )
        return self._hyper.named(self.likelihood)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in the order of the layerwise precisions; empty before the first."""
        return tuple(self._prior.layouts.groups) if self._prior is not None else ()

    @property
    def best(self) -> Record | None:
        """The record of the largest objective (evidence), or None before the first round."""
        return max(self.history, key=lambda record: record.objective, default=None)

    def laplace(self, loader: Iterable[Any]) -> Laplace:
        """Fit a posterior at the model's present weights with today's hyperparameters."""
        return self._blank().fit(loader)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which training goes on as if it had not stopped."""
        return {
            "options": self._plain_options(),
            "sharing": None if self._prior is None else self._prior.digest,
            "hyperparameters": asdict(self._hyper),
            "adam": copy.deepcopy(self._adam),
            "epoch": self._epoch,
            "history": [asdict(record) for record in self.history],
            "groups": None if self._prior is None else groups_to_plain(self._known.groups),
            "patterns": self._patterns,
        }

    def _plain_options(self) -> dict[str, Any]:
        structure = sharing_to_plain(self._fixed["prior_structure"])
        return {**self.options.to_plain(), **self._fixed, "prior_structure": structure}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made with the same options on the same architecture.

        Raises:
            InvalidValue: not a tuner's state, or another model's; nothing is changed then.
        """
        missing = {*self.state_dict()} - set(state)
        if missing:
            raise InvalidValue(
                "not the state of a tuner",
                where="state",
                got=f"no {sorted(missing)}",
                remedy="Pass what state_dict() made",
            )
        check_options(state["options"], self._plain_options())
        device, known, prior = self._network.device, self._known, None
        with refusing_damage():
            hyper = Hyperparameters.from_state(state["hyperparameters"], device)
            history = [Record(**record) for record in state["history"]]
            epoch, patterns = int(state["epoch"]), state["patterns"]
            if patterns is not None:
                patterns = starting_precision(dict(patterns), device)[1]
            if state["groups"] is not None:
                groups = groups_from_plain(state["groups"])
                known = knowledge_of_groups(groups, self._network, self.options)
                prior = self._prior_of(known)
                prior.full(hyper.prior_precision)
                check_same_sharing(prior, state["sharing"])
        self._known, self._prior = known.with_rows_of(self._known), prior
        self._take(hyper)
        self._epoch, self.history, self._patterns = epoch, history, patterns
        self._adam = copy.deepcopy(state["adam"])
