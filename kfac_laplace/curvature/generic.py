"""Exact per-example gradients for parameters that no layer rule covers."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.errors import UnsupportedUse

#: takes parameters by name and one example's inputs to aligned outputs (1, t, c)
ForwardOne = Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor]


class ExampleGraph:
    """Outputs of a batch as a function of a copy of the parameters for each example.

    One vectorised forward pass serves all backward vectors. Where the model cannot be vectorised
    (control flow that depends on the data, operations without a batching rule) it runs example by
    example.

    Args:
        forward: the model on a batch of one, aligned.
        params: the parameters wanted; all others stay as they are.
        inputs: tensors whose first axis runs over the n examples.
    """

    def __init__(self, forward: ForwardOne, params: Mapping[str, Tensor], inputs: Sequence[Tensor]):
        n = inputs[0].shape[0]
        self._copies = {
            name: p.detach().expand(n, *p.shape).clone().requires_grad_()
            for name, p in params.items()
        }

        self._forward, self._inputs = forward, list(inputs)
        self._vectorised = True
        try:
            with warnings.catch_warnings():
                # Slower operations without a batching rule are still right.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                self.outputs = torch.func.vmap(self._one)(self._copies, self._inputs)
        except RuntimeError:
            self._loop()

    def _one(self, copies: Mapping[str, Tensor], example: Sequence[Tensor]) -> Tensor:
        """Outputs (t, c) of one example with its own copy of the parameters."""
        return self._forward(copies, [x[None] for x in example])[0]

    def _loop(self) -> None:
        """The outputs again, example by example."""
        self._vectorised = False
        n = self._inputs[0].shape[0]
        self.outputs = torch.stack(
            [
                self._one(
                    {name: copy[k] for name, copy in self._copies.items()},
                    [x[k] for x in self._inputs],
                )
                for k in range(n)
            ]
        )

    def check(self, expected: Tensor, eps: float) -> None:
        """Each example on its own must give what it gives in the batch.

        Args:
            expected: outputs (n, t, c) of the batch.
            eps: machine precision of the model; half its digits must agree.
        """
        difference = (self.outputs.detach() - expected).abs().max()
        if bool(difference > eps**0.5 * expected.abs().max().clamp_min(1)):
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
        except RuntimeError:
            # Checkpointed parts recompute in the backward pass, where vectorisation is over.
            if not self._vectorised:
                raise
            self._loop()
            return self._gradients(vector)

    def _gradients(self, vector: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(
            self.outputs,
            list(self._copies.values()),
            vector,
            retain_graph=True,
            materialize_grads=True,
        )
        return dict(zip(self._copies, grads, strict=True))
