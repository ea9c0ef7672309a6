"""`MarglikTuner`: optimises hyperparameters by the Laplace evidence during training [ML21, Alg. 1].

The caller keeps the training loop. The tuner supplies the loss at today's hyperparameters and,
every few epochs, one curvature pass and some steps on log δ and log σ.
"""

import copy
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kfac_laplace.curvature.estimate.blocks import Structure
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.curvature.model.forward import Forward
from kfac_laplace.curvature.options import CurvatureKeywords, CurvatureOptions, spelled
from kfac_laplace.curvature.state import groups_from_plain, groups_to_plain, knowledge_of_groups
from kfac_laplace.errors import InvalidValue
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood
from kfac_laplace.marglik.record import Record
from kfac_laplace.options import check_choice, check_positive, check_whole
from kfac_laplace.posterior.evidence import FixedPoint, LogHyperparameters
from kfac_laplace.posterior.gaussian import Hyperparameters, Posterior
from kfac_laplace.posterior.prior import PriorStructure, positive, real
from kfac_laplace.posterior.prior import Structure as Sharing
from kfac_laplace.posterior.state import refusing_damage

log = logging.getLogger("kfac_laplace")

METHODS = ("marglik", "mackay")


class MarglikTuner:
    """Tunes prior precisions, and the noise of regression, by the evidence while you train.

    Args:
        model: the network in training; never changed, its mode and optimiser are the caller's.
        likelihood: "classification", "regression", "binary" or a `Likelihood`.
        n_data: number of training examples (of nodes, where each node has an output), by which the
            loss weighs the prior.
        prior_structure: "layerwise", "scalar" or "diag" (the last not with "kron").
        prior_precision: initial δ.
        prior_mean: μ.
        sigma_noise: initial σ; regression only.
        temperature: T, the same in the loss and in the posterior.
        fix_sigma_noise: leave σ alone.
        kfac_approx: as for `Laplace`; so are fisher, hessian_structure, subset_of_weights,
            joint_bias, uncovered, seed, factor_dtype, dict_key_y, forward_fn and batch_fn.
        n_epochs_burnin: no round before this epoch (epochs count from 1).
        marglik_frequency: a round in every epoch that is a multiple of it.
        n_hypersteps: steps in each round.
        lr_hyp: Adam's learning rate on log δ and log σ ("marglik").
        method: "marglik" for Adam on the evidence, "mackay" for its fixed point.

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
        prior_structure: Sharing = "layerwise",
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        sigma_noise: float | Tensor = 1.0,
        temperature: float = 1.0,
        fix_sigma_noise: bool = False,
        dict_key_y: str = "labels",
        n_epochs_burnin: int = 0,
        marglik_frequency: int = 1,
        n_hypersteps: int = 10,
        lr_hyp: float = 0.1,
        method: str = "marglik",
        hessian_structure: Structure = "kron",
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
        self.model = model
        self.n_data = n_data
        self.n_epochs_burnin, self.marglik_frequency = n_epochs_burnin, marglik_frequency
        self.n_hypersteps, self.lr_hyp, self.method = n_hypersteps, lr_hyp, method
        self._fixed: dict[str, Any] = {
            "prior_structure": prior_structure,
            "prior_mean": prior_mean,
            "dict_key_y": dict_key_y,
        }
        blank = Laplace(
            model,
            likelihood,
            prior_precision=prior_precision,
            sigma_noise=sigma_noise,
            temperature=temperature,
            hessian_structure=hessian_structure,
            **self._fixed,
            **options,
        )
        self.options = blank.options
        self.likelihood = blank.likelihood
        self._network, self._known = blank.curvature.network, blank.curvature.ggn.knowledge
        self._hyper = Hyperparameters(
            blank.prior_precision.detach(), blank.sigma_noise.detach(), blank.temperature
        )
        self._with_noise = self.likelihood.has_noise and not fix_sigma_noise
        self._adam: dict[str, Any] | None = None
        self._prior: PriorStructure | None = None
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
        target = target.to(output.device)
        axis = self.likelihood.class_axis(output, target)
        f = accumulable(self.likelihood.align(output, axis))
        y = self.likelihood.align_target(target, f.detach())
        sigma, temperature = self._hyper.sigma_noise.to(f), self._hyper.temperature.to(f)
        fit = -self.likelihood.log_prob(f, y, sigma).mean() / temperature
        return fit + self._penalty().to(f.dtype) / (2 * self.n_data)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The model's output on a batch of a loader, in the model's present mode, and its targets.

        Args:
            batch: a pair (x, y), a mapping with targets, graphs, or what `batch_fn` takes.
        """
        x, y = split_batch(batch, self._key_y, self.options.batch_fn)
        # Through wrappers, as the caller trains it: data parallelism averages gradients in them.
        run = Forward(self.model, self.options.forward_fn)
        return run(self._network.batch(x, len(y)).x), y

    def _penalty(self) -> Tensor:
        """Σ δ (θ − μ)² over the parameters in the posterior."""
        params = {
            n: accumulable(p) for n, p in self._network.parameters(self._known.tracked).items()
        }
        mean = real(self._fixed["prior_mean"], "prior_mean", self._network.device).detach()
        delta = self._hyper.prior_precision
        if self._prior is None:
            partial = self.options.subset_of_weights == "last_layer"
            partial |= self.options.uncovered == "freeze"
            if delta.numel() > 1 or mean.numel() > 1 or partial:
                raise InvalidValue(
                    "which parameters belong to which precision shows only when the model is used",
                    where="prior_precision",
                    got="a loss before the first batch was seen",
                    remedy="Call tuner.prepare(loader) once before training",
                )
            squares = [(p - mean.to(p.dtype)).square().sum() for p in params.values()]
            return delta.to(squares[0].dtype).reshape(()) * torch.stack(squares).sum()
        prior = self._prior
        means = prior.by_parameter(mean.reshape(-1).expand(prior.size))
        squares = []
        for name, delta_block in prior.by_group(delta).items():
            layout = prior.layouts[name]
            spread = layout.unpack(delta_block.expand(layout.matrix))
            for parameter in layout.params:
                p = params[parameter]
                pull = spread[parameter].to(p.dtype) * (p - means[parameter].to(p.dtype)).square()
                squares.append(pull.sum())
        return torch.stack(squares).sum()

    def prepare(self, loader: Iterable[Any]) -> None:
        """Learn the groups of parameters from a loader's first batch, before the first round.

        Needed only where the loss cannot know before it which precision pulls which parameter:
        several initial precisions or means, "last_layer", or uncovered="freeze".
        """
        curvature = self._blank().curvature
        curvature.fit([*islice(loader, 1)], key_y=self._key_y)
        self._learn_groups(curvature.ggn.knowledge)

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
        hyper, adam = self._improved(la.posterior)
        with torch.no_grad():
            posterior = la.posterior.at(hyper)
            record = Record(
                epoch=epoch,
                evidence=float(posterior.log_marginal_likelihood),
                log_likelihood=float(posterior.log_likelihood),
                log_det_ratio=float(posterior.log_det_ratio),
                scatter=float(posterior.scatter),
                hyperparameters=self._named(hyper),
                seconds=time.perf_counter() - start,
                curvature_seconds=curvature_seconds,
            )
        self._learn_groups(la.curvature.ggn.knowledge)
        self._hyper, self._adam, self._epoch = hyper, adam, epoch
        self.history.append(record)
        return record

    def _blank(self, options: CurvatureOptions | None = None) -> Laplace:
        """An unfitted posterior at today's hyperparameters, with other options if any."""
        blank = Laplace(
            self.model,
            self.likelihood,
            prior_precision=self._hyper.prior_precision,
            sigma_noise=self._hyper.sigma_noise,
            temperature=float(self._hyper.temperature),
            **self._fixed,
            **(options or self.options).keywords(),
        )
        blank.curvature.remember(self._known)
        return blank

    def _synchronise(self) -> None:
        """Wait for the device, so that the clock tells the pass from the steps."""
        if self._network.device.type == "cuda":
            torch.cuda.synchronize(self._network.device)

    def _prior_of(self, known: Knowledge) -> PriorStructure:
        layouts = {group.name: group.layout for group in known.groups}
        return PriorStructure(self._fixed["prior_structure"], layouts, known.params)

    def _learn_groups(self, known: Knowledge) -> None:
        self._known, self._prior = known, self._prior_of(known)

    def _improved(self, posterior: Posterior) -> tuple[Hyperparameters, dict[str, Any] | None]:
        """The hyperparameters after this round's steps, and Adam's state after them."""
        if self.method == "mackay":
            with torch.no_grad():
                place = FixedPoint(posterior, self._with_noise)
                for _ in range(self.n_hypersteps):
                    place = place.next()
            return place.posterior.hyperparameters, None
        free = LogHyperparameters(
            posterior.hyperparameters, posterior.prior.length, self._with_noise
        )
        adam = torch.optim.Adam(free.leaves, lr=self.lr_hyp)
        if self._adam is not None:
            adam.load_state_dict(copy.deepcopy(self._adam))
            adam.param_groups[0]["lr"] = self.lr_hyp
        with torch.inference_mode(False), torch.enable_grad():
            for _ in range(self.n_hypersteps):
                adam.zero_grad()
                (-posterior.at(free.value()).log_marginal_likelihood).backward()
                adam.step()
        return free.value().detached(), adam.state_dict()

    # --- results -----------------------------------------------------------------------------

    def hyperparameters(self) -> dict[str, Tensor]:
        """Today's values, detached, float64: δ, and σ for regression, by name."""
        return self._named(self._hyper)

    def _named(self, hyper: Hyperparameters) -> dict[str, Tensor]:
        named = {"prior_precision": hyper.prior_precision.detach().clone()}
        if self.likelihood.has_noise:
            named["sigma_noise"] = hyper.sigma_noise.detach().clone()
        return named

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in the order of the layerwise precisions; empty before the first."""
        return tuple(self._prior.layouts) if self._prior is not None else ()

    @property
    def best(self) -> Record | None:
        """The record of highest evidence, or None before the first round."""
        return max(self.history, key=lambda record: record.evidence, default=None)

    def laplace(self, loader: Iterable[Any]) -> Laplace:
        """Fit a posterior at the model's present weights with today's hyperparameters."""
        return self._blank().fit(loader)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, from which training goes on as if it had not stopped."""
        return {
            "hyperparameters": asdict(self._hyper),
            "adam": copy.deepcopy(self._adam),
            "epoch": self._epoch,
            "history": [asdict(record) for record in self.history],
            "groups": None if self._prior is None else groups_to_plain(self._known.groups),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made with the same options on the same architecture.

        Raises:
            InvalidValue: not a tuner's state, or another model's; nothing is changed then.
        """
        missing = {"hyperparameters", "adam", "epoch", "history", "groups"} - set(state)
        if missing:
            raise InvalidValue(
                "not the state of a tuner",
                where="state",
                got=f"no {sorted(missing)}",
                remedy="Pass what state_dict() made",
            )
        device, known = self._network.device, None
        with refusing_damage():
            stored = state["hyperparameters"]
            hyper = Hyperparameters(
                positive(stored["prior_precision"], "prior_precision", device),
                positive(stored["sigma_noise"], "sigma_noise", device),
                positive(stored["temperature"], "temperature", device),
            )
            history = [Record(**record) for record in state["history"]]
            epoch = int(state["epoch"])
            if state["groups"] is not None:
                groups = groups_from_plain(state["groups"])
                known = knowledge_of_groups(groups, self._network, self.options)
                self._prior_of(known).full(hyper.prior_precision)
        if known is not None:
            self._learn_groups(known.with_rows_of(self._known))
        self._hyper, self._epoch, self.history = hyper, epoch, history
        self._adam = copy.deepcopy(state["adam"])
