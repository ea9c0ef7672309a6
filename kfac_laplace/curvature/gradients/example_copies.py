"""Exact per-example gradients for parameters that no layer rule covers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.tensors import has_values
from kfac_laplace.errors import KfacLaplaceError, UnsupportedUse

#: takes parameters by name and inputs to aligned outputs (rows, t, c)
ForwardOne = Callable[[Mapping[str, Tensor], Any], Tensor]


class ExampleGraph:
    """Outputs of a batch as a function of a copy of the parameters for each example.

    The model runs example by example, once for all backward vectors. Vectorised over the copies it
    would be faster, but not the same model: hooks on gradients are passed over, `requires_grad` is
    False inside, and what modules keep is of no use afterwards.

    Args:
        forward: the model, aligned.
        params: the parameters wanted; all others stay as they are.
        batch: inputs of n examples.
    """

    def __init__(self, forward: ForwardOne, params: Mapping[str, Tensor], batch: AnyBatch):
        self._copies = {
            name: p.detach().expand(batch.n, *p.shape).clone().requires_grad_()
            for name, p in params.items()
        }
        rows = [self._alone(forward, batch, k) for k in range(batch.n)]
        self.outputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=self.outputs.device)
        places = torch.arange(self.outputs.shape[1], device=lengths.device)
        #: Positions (n, t) that examples have in their batch alone, beside longer ones.
        self.padding = places >= lengths[:, None]

    def _alone(self, forward: ForwardOne, batch: AnyBatch, k: int) -> Tensor:
        """Outputs (t, c) of one example with its own copy of the parameters."""
        copies = {name: copy[k] for name, copy in self._copies.items()}
        try:
            rows = forward(copies, batch.select(torch.tensor([k], device="cpu")).x)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, KfacLaplaceError) or ran_out_of_memory(error):
                raise
            raise UnsupportedUse(
                "the model cannot run on one example alone",
                where=", ".join(self._copies),
                got=f"{type(error).__name__}: {error}",
                remedy="These parameters need per-example gradients: freeze them, or make the "
                "model treat examples alone (no batch statistics)",
            ) from error
        return rows.reshape(-1, rows.shape[-1])

    def check(self, expected: Tensor, eps: float) -> None:
        """Each example on its own must give what it gives in the batch.

        Args:
            expected: outputs (n, t, c) of the batch.
            eps: machine precision of the model; half its digits must agree.
        """
        fits = self.outputs.shape == expected.shape
        if fits and not has_values(expected):
            return
        difference: Tensor | float = torch.inf
        if fits:
            change = (self.outputs.detach() - expected).abs()
            difference = change.masked_fill(self.padding[..., None], 0).max()
        if not fits or bool(difference > eps**0.5 * expected.abs().max().clamp_min(1)):
            raise mixed_examples(float(difference))

    def check_padding(
        self, outputs: Tensor, params: Mapping[str, Tensor], weights: Tensor | None
    ) -> None:
        """Outputs that examples have beside longer ones alone must not depend on the parameters.

        Args:
            outputs: (n, t, c) of the batch, in their graph.
            params: the parameters that were copied, in the same graph.
            weights: weights of the outputs in the loss, where they differ.

        Raises:
            UnsupportedUse: an output that counts does.
        """
        if not has_values(outputs):
            return
        counts = self.padding[..., None].to(outputs.dtype)
        if weights is not None:
            counts = counts * (weights != 0)
        if not outputs.requires_grad or not bool(counts.any()):
            return
        size = torch.arange(1, counts[..., 0].numel() + 1, dtype=outputs.dtype, device="cpu").sqrt()
        probe = (counts * size.reshape(counts.shape[:2]).to(counts)[..., None]).expand_as(outputs)
        found = torch.autograd.grad(
            outputs, list(params.values()), probe, retain_graph=True, allow_unused=True
        )
        wrong = [n for n, g in zip(params, found, strict=True) if g is not None and bool(g.any())]
        if wrong:
            raise UnsupportedUse(
                "outputs at padded positions depend on this parameter, and count in the loss",
                where=wrong[0],
                got="sequences that are shorter alone than in their batch",
                remedy="Return outputs of one length, give padded positions a label that is "
                "ignored, or freeze the parameter",
            )

    def gradients(self, vector: Tensor) -> dict[str, Tensor]:
        """Jᵀv of each example by parameter name, shape (n, *shape), for v (n, t, c)."""
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


def mixed_examples(difference: float) -> UnsupportedUse:
    """The error where outputs depend on what else is in the batch, by so much."""
    return UnsupportedUse(
        "an example alone gives another output than in its batch",
        where="model",
        got=f"a difference of {difference:.2e}",
        remedy="Make the model treat examples alone in evaluation mode: no statistics, sums, "
        "orders or attention over the batch. Inputs shared by all examples (masks, positions) must "
        "not look like batches: give them a leading axis of 1, or use another batch size",
    )
