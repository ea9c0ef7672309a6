"""Exact per-example gradients for parameters that no layer rule covers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.unchanged import attributes_kept, has_hooks
from kfac_laplace.errors import UnsupportedUse

#: takes parameters by name and inputs to aligned outputs (rows, t, c)
ForwardOne = Callable[[Mapping[str, Tensor], Any], Tensor]


class ExampleGraph:
    """Outputs of a batch as a function of a copy of the parameters for each example.

    One vectorised forward pass serves all backward vectors. Where the model cannot be vectorised
    (control flow that depends on the data, operations without a batching rule, graphs) it runs
    example by example.

    Args:
        forward: the model, aligned.
        model: itself, whose attributes are put back: what it keeps inside a vectorised pass is of
            no use outside. One with hooks is not vectorised.
        params: the parameters wanted; all others stay as they are.
        batch: inputs of n examples.
    """

    def __init__(
        self,
        forward: ForwardOne,
        model: nn.Module,
        params: Mapping[str, Tensor],
        batch: AnyBatch,
    ):
        self._copies = {
            name: p.detach().expand(batch.n, *p.shape).clone().requires_grad_()
            for name, p in params.items()
        }
        self._forward, self._batch = forward, batch
        self._vectorised = isinstance(batch, Batch) and not has_hooks(model)
        if not isinstance(batch, Batch) or has_hooks(model):
            self._loop()
            return
        try:
            with attributes_kept(model), warnings.catch_warnings():
                # Slower operations without a batching rule are still right.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                self.outputs = torch.func.vmap(self._one)(self._copies, batch.by_example)
        except Exception as error:  # models raise what they like at tensors without data
            self._loop(error)

    def _one(self, copies: Mapping[str, Tensor], example: Sequence[Tensor]) -> Tensor:
        """Outputs (t, c) of one example with its own copy of the parameters."""
        assert isinstance(self._batch, Batch)
        return self._forward(copies, self._batch.with_examples([x[None] for x in example]))[0]

    def _loop(self, reason: Exception | None = None) -> None:
        """The outputs again, example by example."""
        self._vectorised = False
        outputs = []
        for k in range(self._batch.n):
            copies = {name: copy[k] for name, copy in self._copies.items()}
            alone = self._batch.select(torch.tensor([k]))
            try:
                rows = self._forward(copies, alone.x)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise UnsupportedUse(
                    "the model cannot run on one example alone",
                    where=", ".join(self._copies),
                    got=f"{type(error).__name__}: {error}",
                    remedy="These parameters need per-example gradients: freeze them, or make the "
                    "model treat examples alone (no batch statistics)",
                ) from (reason or error)
            outputs.append(rows.reshape(-1, rows.shape[-1]))
        self.outputs = torch.nn.utils.rnn.pad_sequence(outputs, batch_first=True)

    def check(self, expected: Tensor, eps: float) -> None:
        """Each example on its own must give what it gives in the batch.

        Args:
            expected: outputs (n, t, c) of the batch.
            eps: machine precision of the model; half its digits must agree.
        """
        fits = self.outputs.shape == expected.shape
        difference = (self.outputs.detach() - expected).abs().max() if fits else torch.inf
        if not fits or bool(difference > eps**0.5 * expected.abs().max().clamp_min(1)):
            raise UnsupportedUse(
                "an example alone gives another output than in its batch",
                where="model",
                got=f"a difference of {float(difference):.2e}",
                remedy="Inputs shared by all examples (masks, positions) must not look like "
                "batches: give them a leading axis of 1, or make the model treat examples alone",
            )

    def gradients(self, vector: Tensor) -> dict[str, Tensor]:
        """Jᵀv of each example by parameter name, shape (n, *shape), for v (n, t, c)."""
        try:
            return self._gradients(vector)
        except RuntimeError as error:
            # Checkpointed parts recompute in the backward pass, where vectorisation is over.
            if not self._vectorised:
                raise
            self._loop(error)
            return self._gradients(vector)

    def _gradients(self, vector: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(
            self.outputs,
            list(self._copies.values()),
            vector,
            retain_graph=True,
            allow_unused=True,
        )
        found = {}
        for name, grad in zip(self._copies, grads, strict=True):
            if grad is None:  # the recorded pass reached it
                raise UnsupportedUse(
                    "the output stops depending on this parameter when it is replaced",
                    where=name,
                    remedy="The model keeps tensors from earlier calls: clear them in `train`, or "
                    "freeze this parameter",
                )
            found[name] = grad
        return found
