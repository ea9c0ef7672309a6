"""A model as the backend sees it: its tracked parameters, its groups, one recorded pass a batch."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.gradients.forward_pass import Pass, UseKey
from kfac_laplace.curvature.gradients.groups import (
    Group,
    Subset,
    find_groups,
    last_layer,
    select_parameters,
)
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.batches import AnyBatch, as_batch
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.model.channels_last import ChannelsLast
from kfac_laplace.curvature.model.forward import Forward, ForwardFn
from kfac_laplace.curvature.model.unchanged import device_of, unwrap
from kfac_laplace.curvature.recording.tape import Recording, Tape
from kfac_laplace.curvature.rows.row_layout import RowLayout
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import Likelihood

#: What a network learns from batches, but for what the log has said already.
LEARNED = (
    "groups", "class_axis", "row_layouts", "settled", "tracked", "watched", "reorders",
    "row_entries",
)  # fmt: skip


@dataclass
class Network:
    """What is known about a model: which parameters are tracked, their groups, the row layouts.

    Args:
        model: the caller's model, unwrapped.
        likelihood: gives the class axis of the outputs.
        subset: `subset_of_weights`.
        joint_bias: whether weight and bias share a block.
        forward_fn: runs the model on the inputs of a batch, where calling it does not.
        budget: how much memory gradients may take.
    """

    model: nn.Module
    likelihood: Likelihood
    subset: Subset
    joint_bias: bool
    forward_fn: ForwardFn | None = None
    budget: Budget = Budget()
    groups: tuple[Group, ...] = ()
    class_axis: int = -1
    row_layouts: dict[UseKey, RowLayout | None] = field(default_factory=dict)
    settled: set[UseKey] = field(default_factory=set)
    listed: bool = False  # what has no Kronecker factors, in the log
    watched: bool = False  # for gradients that cancel under reduce
    reorders: bool = True  # images to channels last
    row_entries: int = 1  # gradient rows of one example and vector, all recorded calls together

    def __post_init__(self) -> None:
        """Unwrap the model and pick the tracked parameters."""
        self.model = unwrap(self.model)
        self.forward = Forward(self.model, self.forward_fn)
        params = dict(self.model.named_parameters())
        trainable = [name for name, p in params.items() if p.requires_grad]
        shapes = {name: p.shape for name, p in params.items()}
        self.tracked = select_parameters(shapes, trainable, self.subset)
        if not self.tracked:
            raise InvalidValue(
                "no trainable parameter",
                where="model",
                got=f"{len(params)} parameters",
                remedy="Set requires_grad, or widen subset_of_weights",
            )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return device_of(self.model)

    def live_parameters(self) -> dict[str, Tensor]:
        """The tracked parameters as they are in the model now."""
        params = dict(self.model.named_parameters())
        return {name: params[name] for name in self.tracked}

    def batch(self, x: Any, n: int | None = None) -> AnyBatch:
        """Inputs of n examples (if known) on the model's device; `InvalidValue` if none."""
        return as_batch(x, self.device, n)

    def run(self, batch: AnyBatch, params: Mapping[str, Tensor] | None = None) -> Pass:
        """Record a forward pass at `params` (the model's own by default)."""
        if params is None:
            used = self.live_parameters()
        else:
            used = {name: p.detach().requires_grad_() for name, p in params.items()}
        substitutes = None if params is None else used
        recording = self._reordered(batch, used, substitutes) if self.reorders else None
        return Pass(self, recording or self._record(batch, used, substitutes), batch, used)

    def _record(
        self,
        batch: AnyBatch,
        used: Mapping[str, Tensor],
        substitutes: Mapping[str, Tensor] | None,
        mode: AbstractContextManager[Any] | None = None,
    ) -> Recording:
        """Record a forward pass over a copy of the batch: models may write into their inputs."""
        own = batch.copied()
        with Tape(used, own.data, own.n) as tape, mode or nullcontext():
            output = self.forward(own.x, substitutes)
        return tape.recording(output)

    def _reordered(
        self, batch: AnyBatch, used: Mapping[str, Tensor], substitutes: Mapping[str, Tensor] | None
    ) -> Recording | None:
        """A recording with channels last, or None if the model means another order.

        A model that fails so is asked again without: an error of its own comes then.
        """
        order = ChannelsLast()
        try:
            recording = self._record(batch, used, substitutes, order)
        except Exception:  # models raise what they like at tensors in another order
            if not order.used:
                raise
            self.reorders = False
            return None
        self.reorders = order.harmless and not (order.used and recording.has_python_functions)
        return recording if self.reorders or not order.used else None

    def knowledge(self) -> dict[str, Any]:
        """What was learned so far, to be put back by `forget_since`."""
        return {name: copy.copy(getattr(self, name)) for name in LEARNED}

    def forget_since(self, known: Mapping[str, Any]) -> None:
        """Forget what was learned from a batch that was refused."""
        for name, value in known.items():
            setattr(self, name, value)

    def check_examples(self, passed: Pass) -> None:
        """An example alone must give what it gives in the batch.

        Otherwise inputs shared by all examples were taken for batches. One input tensor cannot be.
        """
        batch = passed.batch
        if len(batch.data) < 2 or batch.n < 2 or batch.segments:
            return
        last = torch.tensor([batch.n - 1])
        with torch.no_grad():
            alone = accumulable(self.forward(batch.select(last).x))
        together = accumulable(passed.recording.output.detach())[-1:]
        eps = torch.finfo(passed.recording.output.dtype).eps
        close = alone.shape == together.shape and torch.allclose(
            alone, together, rtol=eps**0.5, atol=eps**0.5 * float(together.abs().max())
        )
        if not close:
            raise UnsupportedUse(
                "an example alone gives another output than in its batch",
                where="model",
                got=f"several inputs whose first axis has length {batch.n}",
                remedy="Inputs shared by all examples (masks, positions) must not look like "
                "batches: give them a leading axis of 1, or use another batch size",
            )

    def remember(self, other: "Network") -> None:
        """Take over from the same model how rows lie in its layers: no need to probe again."""
        self.row_layouts |= other.row_layouts
        self.settled |= other.settled
        self.watched |= other.watched
        self.listed |= other.listed
        self.reorders &= other.reorders

    def learn(self, first: Pass) -> None:
        """Find groups (and with "last_layer" the tracked parameters) from the first pass."""
        recording = first.recording
        if self.subset == "last_layer":
            chosen = last_layer(recording)
            self.tracked = [name for name in self.tracked if name in chosen]
        params = dict(self.model.named_parameters())
        shapes = {name: params[name].shape for name in self.tracked}
        ungrouped = {
            name
            for (names, _), row_layout in self.row_layouts.items()
            if row_layout is None
            for name in names
        }
        self.groups = find_groups(recording, shapes, self.joint_bias, frozenset(ungrouped))
        layers = [use.layer for use in recording.uses]
        entries = sum(prod(la.inputs.lead) * la.matrix[0] * la.matrix[1] for la in layers)
        self.row_entries = max(1, entries // first.n)
