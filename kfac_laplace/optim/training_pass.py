"""One recorded training pass: its blocks, from our vectors or from the caller's backward pass."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node, get_gradient_edge

from kfac_laplace.curvature.estimate.blocks import Block, KroneckerBlock
from kfac_laplace.curvature.estimate.estimator import Estimand, accumulators, estimate, finished
from kfac_laplace.curvature.estimate.fisher import Empirical
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.recording.backward import listen
from kfac_laplace.curvature.recording.live_rows import is_nonzero
from kfac_laplace.errors import InvalidValue

log = logging.getLogger("kfac_laplace")

Blocks = dict[str, KroneckerBlock]
#: takes the blocks of a pass, and its number of examples
Receive = Callable[[Blocks, int], None]


class TrainingPass:
    """Waits for the caller's backward pass through one recorded forward pass, which counts then.

    A forward pass whose outputs enter no loss is not training; one whose backward pass raises has
    no gradients. So blocks are handed on when a backward pass that reaches parameters has ended.

    Args:
        passed: the pass, its groups those to be captured; at least one.
        estimand: what is wanted.
        generator: source of labels and signs.
        all_read: whether outputs depend on every row, as far as is known.
        receive: a method that takes the blocks, held weakly.
        looks: whether to look if the loss is that of the likelihood.
    """

    def __init__(
        self,
        passed: ForwardPass,
        estimand: Estimand,
        generator: Generator,
        all_read: bool,
        receive: Receive,
        looks: bool,
    ):
        self._receive = weakref.WeakMethod(receive)
        self._n, self._done, self._task = passed.n, False, -1
        self._finish: Callable[[], Blocks] | None
        self._leaves = _leaves(passed)
        if isinstance(estimand.fisher, Empirical):
            self._finish = _listening(passed, estimand, all_read, partial(_reaches, self._leaves))
        else:
            blocks = _estimated(passed, estimand, generator)
            self._finish = lambda: blocks
        recording = passed.recording
        top = get_gradient_edge(recording.output)
        # Writing into a view of the outputs takes their node out of the graph, no layer's.
        for node in (top.node, recording.uses[-1].edge.node):
            node.register_prehook(self._begun)
        if looks:
            counts = partial(_reaches, self._leaves)
            top.node.register_prehook(_checking_loss(passed, top.output_nr, counts))

    def _begun(self, gradients: Sequence[Tensor | None]) -> None:
        """A backward pass has come to the outputs: if it goes on to parameters, await its end."""
        task = torch._C._current_graph_task_id()
        if not self._done and task != self._task and _reaches(self._leaves):
            self._task = task
            # torch has no public name for what runs after a backward pass that did not fail.
            Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        """Hand the blocks on, once: a graph that is retained need not hold them."""
        receive, finish, self._finish = self._receive(), self._finish, None
        self._done = True
        if receive is not None and finish is not None:
            with torch.no_grad():
                receive(finish(), self._n)


def _checking_loss(
    passed: ForwardPass, index: int, counts: Callable[[], bool]
) -> Callable[[Sequence[Tensor | None]], None]:
    """What looks, by the gradient of the outputs, whether the loss is that of the likelihood.

    It raises `InvalidValue` where the loss has its classes on another axis than we take.
    """
    likelihood, shape = passed.likelihood, passed.recording.output.shape
    axis = passed.knowledge.class_axis % len(shape)

    def check(gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[index]
        if gradient is None or gradient.shape != shape or not counts():
            return
        axes = likelihood.axes_of_gradient(gradient.detach())
        if axes == ():
            log.warning(
                "the loss does not look like that of the likelihood '%s': its gradients say "
                "otherwise. Give KFAC the likelihood that belongs to the loss, as 'regression' or "
                "'binary'; the curvature is another's otherwise",
                type(likelihood).__name__,
            )
        elif axes and axis not in axes:
            raise InvalidValue(
                "the loss takes another axis of the outputs for the classes of a row",
                where="class_axis",
                got=f"axis {axis} of an output {tuple(shape)}, where the gradient says {axes[0]}",
                remedy=f"Pass class_axis={axes[0]}",
            )

    return check


def _estimated(passed: ForwardPass, estimand: Estimand, generator: Generator) -> Blocks:
    """Blocks from vectors of our own, on the caller's graph, which stays as it is."""
    f = passed.outputs.detach()
    y = passed.likelihood.stand_in_targets(f, generator)
    passed = passed.weighted(passed.likelihood.importance(y))
    return _kronecker(estimate(passed, estimand, y, generator))


def _listening(
    passed: ForwardPass, estimand: Estimand, all_read: bool, counts: Callable[[], bool]
) -> Callable[[], Blocks]:
    """Blocks of the caller's own gradient rows r: B = Σ r rᵀ; call the result when they came.

    Groups without any gradient are left out. Rows without a gradient count where outputs of the
    loss depend on them, as behind a rectifier that is off.
    """
    if not all_read:
        _ = passed.reachable  # afterwards the graph is gone
    made = accumulators(passed, estimand)
    came: set[int] = set()

    def receive(u: int, rows: Tensor) -> None:
        came.add(u)
        with torch.no_grad():
            for part in made.values():
                if u in part.uses:
                    part.receive(u, rows)

    wanted = sorted(frozenset[int]().union(*(part.uses for part in made.values())))
    listen(passed.recording, wanted, receive, counts)
    _excluding_ignored(passed, counts)

    def end() -> Blocks:
        with torch.no_grad():
            if all_read and not passed.seen.settled:
                passed.seen.settle(None)
            for part in made.values():
                part.finish_vector({})
        heard = {name: part for name, part in made.items() if part.uses <= came}
        return _kronecker(finished(passed, heard))

    return end


def _excluding_ignored(passed: ForwardPass, counts: Callable[[], bool]) -> None:
    """Once the gradient of the outputs shows some that the loss ignores, take out their rows.

    What the others depend on takes a backward pass within the caller's, whose graph is still there.
    """
    recording, axis = passed.recording, passed.knowledge.class_axis
    top = get_gradient_edge(recording.output)
    shape = recording.output.shape

    def look(gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[top.output_nr]
        if gradient is None or gradient.shape != shape or passed.seen.settled or not counts():
            return
        rows = accumulable(passed.likelihood.align(gradient.detach(), axis))
        used = is_nonzero(rows).any(-1, keepdim=True)  # (rows, t, 1)
        if not bool(used.all()):
            weighted = passed.weighted(passed.by_example(used.to(rows)))
            with torch.enable_grad():
                passed.seen.settle(dict(enumerate(weighted.reachable)))

    top.node.register_prehook(look)


def _kronecker(blocks: Mapping[str, Block]) -> Blocks:
    """Blocks of groups of which all have Kronecker factors."""
    return {name: b for name, b in blocks.items() if isinstance(b, KroneckerBlock)}


def _leaves(passed: ForwardPass) -> list[Node]:
    """The graph nodes of what parameters were recorded as."""
    uses = passed.recording.uses
    return list({source.edge.node for use in uses for source in use.sources})


def _reaches(leaves: Sequence[Any]) -> bool:
    """Whether the backward pass at hand will reach some parameter.

    One for derivatives by inputs does not, and is no training.
    """
    try:
        return any(torch._C._will_engine_execute_node(leaf) for leaf in leaves)
    except RuntimeError:  # asked of a leaf whose gradient `torch.autograd.grad` will return
        return True
