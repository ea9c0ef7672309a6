"""What a round of hyperparameter steps leaves behind."""

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.objectives import Objective
from kfac_laplace.posterior.optimum import value_of

log = logging.getLogger("kfac_laplace")


@dataclass(frozen=True)
class Record:
    """One round of hyperparameter steps.

    Args:
        epoch: epoch after which it took place.
        evidence: log q(D) at the new hyperparameters, in nats over the whole data; parameters
            without effect on the outputs have no part in it.
        log_likelihood: Σ log p(y | f, σ), before division by T.
        log_det_ratio: log det P − log det P₀.
        scatter: (θ − μ)ᵀ P₀ (θ − μ), likewise.
        hyperparameters: detached values by name.
        objective: what the round maximised: the evidence unless the tuner was given another.
        seconds: duration of the whole round.
        curvature_seconds: duration of the curvature pass within it.
        n_data: number of examples (of nodes, where each has an output) that the evidence is over.
        groups: names of the groups, in the order of layerwise precisions.
        parameters: number of scalar parameters in the posterior.
        effective_dimensions: γ of each group at these hyperparameters, float64 (groups,): how many
            directions the data determine, by the curvature of the evidence.
        constant_evidence: log-likelihood of the best constant prediction over T: an evidence below
            it says that log-determinants, not data, choose the precisions. NaN where a likelihood
            does not know it.
        shared: whether it took the curvature that the optimiser averages, and log-likelihoods of
            the epoch's losses, in place of a pass over the data. Evidence and objective are
            estimates then, of the network as it was trained, and `best` does not look at them.
    """

    epoch: int
    evidence: float
    log_likelihood: float
    log_det_ratio: float
    scatter: float
    hyperparameters: dict[str, Tensor]
    objective: float
    seconds: float
    curvature_seconds: float
    n_data: int
    groups: tuple[str, ...]
    parameters: int
    effective_dimensions: Tensor
    constant_evidence: float
    shared: bool

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        objective: Objective,
        *,
        epoch: int,
        seconds: tuple[float, float],
        shared: bool,
    ) -> "Record":
        """The record of a posterior at the hyperparameters that a round chose.

        Args:
            posterior: at these hyperparameters, `apart_from_unused`.
            objective: what the round maximised.
            epoch: epoch after which it took place.
            seconds: duration of the whole round, and of the curvature pass within it.
            shared: whether the posterior's curvature is the optimiser's.
        """
        return cls(
            epoch=epoch,
            evidence=float(posterior.log_marginal_likelihood),
            log_likelihood=float(posterior.log_likelihood),
            log_det_ratio=float(posterior.log_det_ratio),
            scatter=float(posterior.scatter),
            hyperparameters=posterior.hyperparameters.named(posterior.ggn.likelihood),
            objective=float(value_of(objective, posterior)),
            seconds=seconds[0],
            curvature_seconds=seconds[1],
            n_data=int(posterior.ggn.n_rows),
            groups=tuple(posterior.prior.layouts.groups),
            parameters=posterior.prior.size,
            effective_dimensions=posterior.effective_dimensions_by_group(),
            constant_evidence=posterior.constant_evidence,
            shared=shared,
        )

    def to_dict(self) -> dict[str, Any]:
        """The record in plain numbers, strings and lists, as JSON can hold them.

        Values of which each group has one are named by group. What is not finite is None.
        """
        return {field.name: _plain(getattr(self, field.name), self) for field in fields(self)}

    def scalars(self) -> dict[str, float]:
        """What is worth a curve over epochs, by name; hyperparameters by group, as "name/group".

        Hyperparameters of which there are more than groups are there by "name/min" and "name/max".
        """
        names = ("evidence", "objective", "log_likelihood", "log_det_ratio", "scatter", "seconds")
        found = {name: float(getattr(self, name)) for name in names}
        found["effective_dimensions"] = float(self.effective_dimensions.sum())
        for name, value in self.hyperparameters.items():
            if value.numel() == 1:
                found[name] = float(value)
            elif value.numel() == len(self.groups):
                pairs = zip(self.groups, value.tolist(), strict=True)
                found |= {f"{name}/{group}": number for group, number in pairs}
            else:
                found |= {f"{name}/min": float(value.min()), f"{name}/max": float(value.max())}
        return found


def best_of(history: Sequence[Record], n_data: int) -> Record | None:
    """The record of the largest objective among those that can be compared, or None.

    Evidences over other numbers of data, or of other parameters, are no larger or smaller. Counted
    are rounds with a pass over the data, over the parameters of the last one and over `n_data`
    examples; where no round had as many, over as many as the first of them.

    Args:
        history: all records.
        n_data: number of training examples.
    """
    if not history:
        return None
    last = history[-1]
    alike = [
        record
        for record in history
        if (record.groups, record.parameters) == (last.groups, last.parameters)
        and not record.shared
    ]
    if not alike:
        return None
    sizes = [record.n_data for record in alike]
    size = n_data if n_data in sizes else sizes[0]
    return max((r for r in alike if r.n_data == size), key=lambda record: record.objective)


def rounds_that_moved(history: Sequence[Record]) -> int:
    """How many rounds left other precisions than the round before."""
    deltas = [record.hyperparameters["prior_precision"] for record in history]
    return sum(not torch.equal(a, b) for a, b in zip(deltas, deltas[1:], strict=False))


def warn_of_count(history: Sequence[Record], count: int, n_data: int) -> None:
    """Say, once for each, that a round has another number of examples than was promised.

    Args:
        history: records of the rounds before.
        count: number of examples of this one.
        n_data: what was promised.
    """
    if count != n_data and all(record.n_data != count for record in history):
        log.warning(
            "the loader holds %d examples where n_data=%d was promised: the loss weighs the "
            "prior by n_data, and `best` compares only evidences over as many examples",
            count,
            n_data,
        )


class TakesScalars(Protocol):
    """A writer of curves, as `torch.utils.tensorboard.SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take one value."""
        ...


def add_scalars(writer: TakesScalars, history: Iterable[Record], prefix: str = "marglik") -> None:
    """Write the curves of `Record.scalars` over epochs.

    Args:
        writer: TensorBoard's, or another with `add_scalar`.
        history: the records to be written, such as `tuner.history`, or its last alone.
        prefix: in front of each name.
    """
    for record in history:
        for name, value in record.scalars().items():
            writer.add_scalar(f"{prefix}/{name}", value, record.epoch)


def history_as_json(history: Sequence[Record]) -> str:
    """The records as a list in strict JSON, which has no word for what is not finite but null."""
    return json.dumps([record.to_dict() for record in history], indent=1, allow_nan=False) + "\n"


def _plain(value: Any, record: Record) -> Any:
    """A field of a record in what JSON can hold."""
    if isinstance(value, dict):
        return {name: _plain(entry, record) for name, entry in value.items()}
    if isinstance(value, Tensor):
        numbers = [_plain(number, record) for number in value.flatten().tolist()]
        if value.ndim and len(numbers) == len(record.groups):
            return dict(zip(record.groups, numbers, strict=True))
        return numbers if len(numbers) != 1 else numbers[0]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value
