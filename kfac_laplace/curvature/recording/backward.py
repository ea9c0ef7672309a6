"""Backward passes that hand on the gradients of recorded calls as soon as they are known.

Holding all of them until the last is there costs as much memory as the forward pass again.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from kfac_laplace.curvature.linalg.dtypes import accumulable, without_autocast
from kfac_laplace.curvature.recording.autograd_graph import ancestors, nodes_with_parents
from kfac_laplace.curvature.recording.tape import Recording, Use

#: takes the index of a recorded use and its gradient rows (1, b, *lead, o)
Receive = Callable[[int, Tensor], None]


class Backward:
    """Backpropagates vectors to the outputs of recorded calls, and no further.

    Args:
        recording: a forward pass.
        root: what the vectors are shaped like: outputs of that pass, or the edge of a tensor in it.
        uses: indices of the uses wanted.
    """

    def __init__(self, recording: Recording, root: Tensor | GradientEdge, uses: Sequence[int]):
        top = root.grad_fn if isinstance(root, Tensor) else root.node
        above = nodes_with_parents(top)
        wanted = {u: recording.uses[u] for u in uses if recording.uses[u].edge.node in above}
        passed_through = ancestors([use.edge.node for use in wanted.values()], above)
        self._root = root
        # The engine runs through these on its way to the others, which it gives back.
        self._on_the_way = {u: w for u, w in wanted.items() if w.edge.node in passed_through}
        self._last = {u: w for u, w in wanted.items() if u not in self._on_the_way}

    def __call__(self, vector: Tensor, receive: Receive) -> None:
        """Call `receive` with the gradient rows of each use that the root depends on, once each."""
        if not self._last:
            return
        handles = [
            use.edge.node.register_prehook(_hook(u, use, receive))
            for u, use in self._on_the_way.items()
        ]
        try:
            found = torch.autograd.grad(
                self._root,
                [use.edge for use in self._last.values()],
                vector,
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        for (u, use), gradient in zip(self._last.items(), found, strict=True):
            _hand_on(u, use, gradient, receive)


def listen(
    recording: Recording, uses: Sequence[int], receive: Receive, counts: Callable[[], bool]
) -> list[RemovableHandle]:
    """Have `receive` called with gradient rows of somebody else's backward pass; once each use.

    A second pass through the same graph is another loss, or derivatives of the first.

    Args:
        recording: a forward pass.
        uses: indices of the uses wanted.
        receive: what takes the rows.
        counts: asked in a backward pass, whether it is one that is meant.

    Returns:
        Handles that end it; the graph's own end does as well.
    """
    heard: set[int] = set()

    def hook(u: int, gradients: Sequence[Tensor | None]) -> None:
        if u not in heard and counts():
            heard.add(u)
            use = recording.uses[u]
            _hand_on(u, use, gradients[use.edge.output_nr], receive)

    return [recording.uses[u].edge.node.register_prehook(partial(hook, u)) for u in uses]


def _hook(u: int, use: Use, receive: Receive) -> Callable[[Sequence[Tensor | None]], None]:
    """What a node of the graph calls with the gradients of its outputs, before it runs."""

    def hook(gradients: Sequence[Tensor | None]) -> None:
        _hand_on(u, use, gradients[use.edge.output_nr], receive)

    return hook


def _hand_on(u: int, use: Use, gradient: Tensor | None, receive: Receive) -> None:
    if gradient is not None:
        with without_autocast(gradient.device):
            receive(u, accumulable(use.layer.output_rows(gradient.detach()[None])))
