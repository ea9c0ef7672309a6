"""A model as the backend sees it: run and recorded batch by batch, its parameters put in groups."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import (
    Group,
    Subset,
    find_groups,
    last_layer,
    select_parameters,
)
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.curvature.model.batches import (
    AnyBatch,
    as_batch,
    check_rows,
    with_examples,
)
from kfac_laplace.curvature.model.budget import Budget
from kfac_laplace.curvature.model.channels_last import ChannelsLast
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.forward import Forward, ForwardFn
from kfac_laplace.curvature.model.interface import Interface
from kfac_laplace.curvature.model.parameters import check_real, check_usable
from kfac_laplace.curvature.model.unchanged import device_of, parameters_of, unwrap
from kfac_laplace.curvature.recording.autograd_graph import leaves_behind
from kfac_laplace.curvature.recording.tape import Recording, Tape
from kfac_laplace.errors import InvalidValue, KfacLaplaceError
from kfac_laplace.likelihoods import Likelihood


@dataclass(frozen=True, eq=False)
class Network:
    """A model with what its outputs mean; what batches teach about it is `Knowledge`.

    Args:
        model: the caller's model, unwrapped.
        likelihood: gives the class axis of the outputs.
        forward_fn: runs the model on the inputs of a batch, where calling it does not.
        budget: how much memory gradients may take.
        guarded: whether guards check calls while a pass is recorded.
    """

    model: nn.Module
    likelihood: Likelihood
    forward_fn: ForwardFn | None = None
    budget: Budget = Budget()
    guarded: bool = True

    @classmethod
    def of(
        cls,
        model: nn.Module,
        likelihood: Likelihood,
        forward_fn: ForwardFn | None = None,
        budget: Budget | None = None,
    ) -> "Network":
        """The network of a model that may be wrapped.

        Raises:
            UnsupportedUse: a scripted or compiled module, parameters on several devices, without
                shapes yet, or made in inference mode.
        """
        model = unwrap(model)
        check_usable(model)
        return cls(model, likelihood, forward_fn, budget or Budget())

    @cached_property
    def forward(self) -> Forward:
        """Runs the model."""
        return Forward(self.model, self.forward_fn)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return device_of(self.model)

    @property
    def device_of_numbers(self) -> torch.device:
        """The same, and the CPU for parameters that have no numbers."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    def select(self, subset: Subset, complex_stay_out: bool = False) -> tuple[str, ...]:
        """Names of the trainable parameters that `subset_of_weights` admits, in model order.

        Those without entries, of layers of width 0, are never in: there is nothing to be random.

        Args:
            subset: `subset_of_weights`.
            complex_stay_out: leave complex parameters out, which no layer rule covers. Under
                "last_layer" they are never in.

        Raises:
            InvalidValue: there are none.
            UnsupportedUse: complex parameters.
        """
        params = parameters_of(self.model)
        trainable = [name for name, p in params.items() if p.requires_grad and p.numel()]
        shapes = {name: p.shape for name, p in params.items()}
        tracked = select_parameters(shapes, trainable, subset)
        if complex_stay_out or subset == "last_layer":
            real = [name for name in tracked if not params[name].is_complex()]
            tracked = real or ([] if complex_stay_out else tracked)
        check_real({name: params[name] for name in tracked})
        if not tracked:
            raise InvalidValue(
                "no trainable parameter",
                where="model",
                got=f"{len(params)} parameters",
                remedy="Set requires_grad, or widen subset_of_weights",
            )
        return tuple(tracked)

    def parameters(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Some parameters as they are in the model now."""
        params = parameters_of(self.model)
        return {name: params[name] for name in names}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of all parameters, by name."""
        return {name: p.shape for name, p in parameters_of(self.model).items()}

    def trained(self, known: Knowledge) -> dict[str, Tensor]:
        """Parameters that earlier batches knew, which must still be there and be trainable.

        Raises:
            InvalidValue: one is frozen now, gone, or of another shape.
        """
        params = self.unchanged(dict.fromkeys(known.tracked) | known.shapes)
        for name, parameter in params.items():
            if not parameter.requires_grad:
                raise _changed(name, "frozen now")
        return params

    def unchanged(self, shapes: Mapping[str, torch.Size | None]) -> dict[str, Tensor]:
        """Parameters as they are in the model now, which must have the shapes they had.

        Args:
            shapes: shapes by name, None where they do not matter.

        Raises:
            InvalidValue: one is gone, or of another shape.
        """
        params = parameters_of(self.model)
        for name, shape in shapes.items():
            if name not in params:
                raise _changed(name, "no longer in the model")
            if shape is not None and params[name].shape != shape:
                raise _changed(name, f"shape {tuple(params[name].shape)} for {tuple(shape)}")
        return {name: params[name] for name in shapes}

    def check_none_new(self, known: Knowledge, subset: Subset, complex_stay_out: bool) -> None:
        """Raise `InvalidValue` for a parameter that is trained now and was not at the first batch.

        Args:
            known: what earlier batches taught.
            subset: `subset_of_weights`.
            complex_stay_out: as for `select`.
        """
        if known.groups:
            self.trained(known)
        if not known.groups or subset == "last_layer":
            return
        new = [name for name in self.select(subset, complex_stay_out) if name not in known.tracked]
        if new:
            raise InvalidValue(
                "parameters are no longer those of the first batch",
                where=", ".join(new),
                got="trained now",
                remedy="Freeze them again, or make a new posterior",
            )

    def batch(self, x: Any, n: int | None = None, interface: Interface | None = None) -> AnyBatch:
        """Inputs of n examples (if known) on the model's device; `InvalidValue` if none."""
        return as_batch(x, self.device, n, interface)

    def output(self, batch: AnyBatch, knowledge: Knowledge, params: Mapping[str, Tensor]) -> Tensor:
        """The model's output at `params`, unrecorded.

        Raises:
            InvalidValue: it has no row for each example.
        """
        output = with_examples(self.forward(batch.x, params), batch, knowledge.interface)
        check_rows(output, batch)
        return output

    def record(
        self, batch: AnyBatch, knowledge: Knowledge, params: Mapping[str, Tensor] | None = None
    ) -> ForwardPass:
        """Record a forward pass at `params` (the model's own by default)."""
        if params is None:
            used = self.trained(knowledge)
        else:
            used = {name: p.detach().requires_grad_() for name, p in params.items()}
        substitutes = None if params is None else used
        known, recording, order = knowledge, None, ChannelsLast()
        if knowledge.reorders:
            recording = self._reordered(batch, used, substitutes, order)
            known = replace(knowledge, reorders=order.harmless)
        reordered = order.used and recording is not None
        recording = recording or self._recorded(batch, used, substitutes)
        return replace(self.read(recording, batch, used, known), reordered=reordered)

    def tape(
        self, batch: AnyBatch, used: Mapping[str, Tensor], data: Sequence[Tensor] | None = None
    ) -> Tape:
        """A tape for a forward pass over a batch, whoever runs it: it records while it is entered.

        Args:
            batch: the inputs.
            used: the tensors that the model uses for its parameters, by name.
            data: the very tensors that it receives and that differ between examples; the batch's
                own by default.
        """
        return Tape(used, batch.data if data is None else data, batch.n, guarded=self.guarded)

    def read(
        self,
        recording: Recording,
        batch: AnyBatch,
        used: Mapping[str, Tensor],
        knowledge: Knowledge,
    ) -> ForwardPass:
        """What a tape recorded, as a pass in the light of what is known."""
        output = with_examples(recording.output, batch, knowledge.interface)
        return ForwardPass(
            self.forward,
            self.likelihood,
            replace(recording, output=output),
            batch,
            used,
            knowledge,
            budget=self.budget,
            guarded=self.guarded,
        )

    def _recorded(
        self,
        batch: AnyBatch,
        used: Mapping[str, Tensor],
        substitutes: Mapping[str, Tensor] | None,
        mode: AbstractContextManager[Any] | None = None,
    ) -> Recording:
        """Record a forward pass over a copy of the batch: models may write into their inputs."""
        own = batch.copied()
        with self.tape(own, used) as tape, mode or nullcontext():
            output = self.forward(own.x, substitutes)
        return tape.recording(output)

    def _reordered(
        self,
        batch: AnyBatch,
        used: Mapping[str, Tensor],
        substitutes: Mapping[str, Tensor] | None,
        order: ChannelsLast,
    ) -> Recording | None:
        """A recording with channels last, or None if it does not count: `order` says what came.

        A model that fails with images in another order is asked again without: an error of its own
        comes then. Where memory ran out, or we refuse, the order is not why.
        """
        try:
            recording = self._recorded(batch, used, substitutes, order)
        except Exception as error:  # models raise what they like at tensors in another order
            if not order.used or isinstance(error, KfacLaplaceError) or ran_out_of_memory(error):
                raise
            order.harmless = False
            return None
        if order.used and recording.has_python_functions:
            order.harmless = False
        return recording if order.harmless or not order.used else None


def _changed(name: str, got: str) -> InvalidValue:
    """The error of a model that was changed under its curvature or posterior."""
    return InvalidValue(
        "parameters are no longer those of the first batch",
        where=name,
        got=got,
        remedy="Put it back as it was, fit anew, or make a new posterior",
    )


def restricted(groups: tuple[Group, ...], subset: Subset, model: nn.Module) -> tuple[Group, ...]:
    """Groups with the entries of a subnetwork alone; as they are where the subset is another."""
    if not isinstance(subset, Subnetwork):
        return groups
    entries = subset.entries({name: p.shape for name, p in model.named_parameters()})
    return tuple(group.restricted(entries) for group in groups)


def learn_groups(passed: ForwardPass, subset: Subset, joint_bias: bool) -> Knowledge:
    """Find groups (and with "last_layer" the tracked parameters) from the first pass.

    Args:
        passed: a pass whose row layouts are known.
        subset: `subset_of_weights`.
        joint_bias: whether weight and bias share a block.
    """
    known, recording = passed.knowledge, passed.recording
    tracked = known.tracked
    if subset == "last_layer":
        chosen = last_layer(recording)
        last = [use for use in recording.uses if use.layer.kronecker][-1]
        behind = leaves_behind(recording.output.grad_fn, last.edge.node)
        named = passed.forward.model.named_parameters()
        # A complex scale behind it is no layer, as a real one is none.
        check_real({n: p for n, p in named if id(p) in behind and p.ndim > 1})
        tracked = tuple(name for name in tracked if name in chosen)
    ungrouped = {
        name
        for (names, _), row_layout in known.row_layouts.items()
        if row_layout is None
        for name in names
    }
    shapes = {name: passed.params[name].shape for name in tracked}
    groups = find_groups(recording, shapes, joint_bias, frozenset(ungrouped))
    every = [use.layer for use in recording.uses]
    entries = sum(prod(la.inputs.lead) * la.matrix[0] * la.matrix[1] for la in every)
    return replace(
        known,
        tracked=tracked,
        groups=restricted(groups, subset, passed.forward.model),
        row_entries=max(1, entries // passed.n),
    )
