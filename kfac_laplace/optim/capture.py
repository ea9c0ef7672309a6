"""Kronecker factors of the training passes that the caller makes: hooks on the model's forward.

Inside a pass that counts, the tape records; after it, blocks are made on the caller's own graph;
they count when the caller's backward pass has ended. What was found is summed until `take`.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from kfac_laplace.curvature.estimate.estimator import Estimand
from kfac_laplace.curvature.estimate.finite import not_finite
from kfac_laplace.curvature.estimate.fisher import Empirical
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.ranks import Ranks
from kfac_laplace.curvature.recording.tape import Tape
from kfac_laplace.optim.averages import Sums
from kfac_laplace.optim.calls import OutputFn, data_of, in_eager_mode, inputs_of, output_of
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.learning import Learned, Lesson, network_for_training
from kfac_laplace.optim.ranks import ranks_of_pass
from kfac_laplace.optim.training_pass import Blocks, TrainingPass

log = logging.getLogger("kfac_laplace")


@dataclass(frozen=True)
class Watched:
    """A forward pass that is being recorded.

    Args:
        tape: what records it.
        batch: its inputs.
        params: the parameters that are tracked.
        eager: in which a compiled model is not.
        thread: in which the model runs.
    """

    tape: Tape
    batch: AnyBatch
    params: Mapping[str, Tensor]
    eager: AbstractContextManager[Any]
    thread: Thread


class Capture:
    """Sums of Kronecker blocks over the training passes since the last `take`.

    A forward pass is recorded if the model is in training mode, gradients are on, `due` says so and
    nothing is paused. It counts once its backward pass has ended.

    Args:
        lesson: the model, and what to learn from the first batch.
        tracked: names of the parameters of which groups are made.
        estimate: which vectors, and up to which width there are factors.
        generator: source of labels and signs.
        output_fn: takes what the model returns to its outputs, where they cannot be told.
        called: the module on which the hooks stand, where it is a wrapper around the model.
    """

    def __init__(
        self,
        lesson: Lesson,
        tracked: tuple[str, ...],
        estimate: Estimate,
        generator: Generator,
        output_fn: OutputFn | None = None,
        called: nn.Module | None = None,
    ):
        self._lesson = replace(lesson, network=network_for_training(lesson.network))
        self._estimate, self._generator = estimate, generator
        self._fisher = estimate.vectors
        self._output_fn = output_fn
        #: The processes of a wrapper for parallel data in which the model has run.
        self.ranks: Ranks | None = None
        #: Whether this step is one of those that are captured.
        self.due = True
        self.known = Knowledge(tracked, reorders=False)
        self.learned: Learned | None = None
        self._watched: Watched | None = None
        self._paused = 0
        self._sums: Sums = {}
        self._n = 0
        self._seen = False  # whether any pass has counted
        #: Output rows and scalar outputs of an example, in the last pass that was captured.
        self.outputs_per_example: tuple[float, float] = (1.0, 1.0)
        self._called = called = called or self._network.model
        handles = (
            called.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            called.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
        )
        self._end = weakref.finalize(self, _remove, handles)

    @property
    def _network(self) -> Network:
        return self._lesson.network

    # --- what the caller's loop sees ---------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes inside are not training: a teacher's, a second one of the same step."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def close(self) -> None:
        """Take the hooks off the model, and forget what was found."""
        self._leave()
        self._end()
        self.drop()

    def drop(self) -> None:
        """Forget what was found since the last `take`: its gradients are gone as well."""
        self._sums, self._n = {}, 0

    def take(self, loss_scale: float = 1.0) -> Sums:
        """The sums so far, each with its number of examples, to be forgotten here.

        Of the empirical Fisher, rows r come from the mean loss over all n examples, perhaps times a
        scale s: scores are n r/s. Nothing is returned where anything is not finite.

        Args:
            loss_scale: s.
        """
        sums, n = self._sums, self._n
        self.drop()
        if isinstance(self._fisher, Empirical):
            weight = (n / loss_scale) ** 2
            sums = {name: (b.with_loss_scaled(weight), m) for name, (b, m) in sums.items()}
        blocks = {name: block for name, (block, _) in sums.items()}
        return sums if not_finite(blocks) is None else {}

    # --- the model's forward pass ------------------------------------------------------------

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Start to record a pass that counts."""
        if self._in_another_thread:
            return
        self._leave()  # of a pass that was interrupted
        if not self._counts(model):
            return
        self.ranks = ranks_of_pass() or self.ranks
        with self.paused():
            inputs = inputs_of(self._network.model, args, kwargs)
            known = self.known if self.learned is None else self.learned.knowledge
            batch = self._network.batch(inputs, None, known.interface)
            # A single example does not show which rows are whose.
            if self.learned is None or (batch.n > 1 and not known.row_layouts):
                self.learned = self._lesson.learn(inputs, known)
                batch = self._network.batch(inputs, None, self.learned.knowledge.interface)
            if self.learned.captured:
                self._enter(batch, inputs)

    def _counts(self, model: Any) -> bool:
        """Whether a call is a training pass to be captured, of the model itself, no copy."""
        return (
            model is self._called
            and not self._paused
            and bool(self.known.tracked)
            and self._network.model.training
            and torch.is_grad_enabled()
            and torch._C._current_graph_task_id() == -1  # a checkpoint runs the model again
            and peek_interpreter_stack() is None
            and self.due
        )

    @property
    def _in_another_thread(self) -> bool:
        """Whether a pass is recorded in another thread, and this call is not of it."""
        thread = None if self._watched is None else self._watched.thread
        return thread is not None and thread is not current_thread() and thread.is_alive()

    def _enter(self, batch: AnyBatch, inputs: Any) -> None:
        """Begin to record what groups with factors do; parameters frozen now are not tracked."""
        assert self.learned is not None
        params = dict(self._network.model.named_parameters())
        tracked = {
            name: params[name]
            for name in self.known.tracked
            if name in params and params[name].requires_grad
        }
        names = {name for group in self.learned.captured for name in group.layout.params}
        recorded = {name: p for name, p in tracked.items() if name in names}
        tape = self._network.tape(batch, recorded, data_of(batch, inputs))
        tape.__enter__()  # type: ignore[no-untyped-call]
        eager = in_eager_mode(self._called)
        eager.__enter__()
        self._watched = Watched(tape, batch, tracked, eager, current_thread())

    def _leave(self) -> Watched | None:
        """Stop recording."""
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.eager.__exit__(None, None, None)
            _take_out(watched.tape)
        return watched

    def _after(self, model: Any, args: Any, kwargs: Any, returned: Any) -> None:
        """Make blocks of a pass that was recorded, unless it failed."""
        if model is not self._called or self._paused or self._in_another_thread:
            return
        watched = self._leave()
        if watched is None or returned is None:
            return
        with self.paused():
            output = output_of(returned, self._output_fn)
            if output.requires_grad and output.shape[0]:
                self._read(watched, output)

    def _read(self, watched: Watched, output: Tensor) -> None:
        """Have the groups that this pass uses as usual captured."""
        learned = self.learned
        assert learned is not None
        recording = watched.tape.recording(output)
        passed = self._network.read(recording, watched.batch, watched.params, learned.knowledge)
        passed = replace(passed, runs_again=False)
        nodes = passed.output_segments is not None
        if passed.recording.output.shape[0] != passed.n and not nodes:
            return
        names = {group.name for group in learned.captured}
        groups = tuple(group for group in passed.regular if group.name in names)
        if not groups or not bool(output.detach().isfinite().all()):
            return
        passed = passed.knowing(replace(learned.knowledge, groups=groups))
        rows = passed.output_rows
        self.outputs_per_example = (len(rows) / passed.n, rows.numel() / passed.n)
        dtype, widest = SumDtype(torch.float32), self._estimate.largest
        estimand = Estimand("kron", learned.settings, self._fisher, dtype, widest)
        read, looks = learned.all_read, not self._seen
        TrainingPass(passed, estimand, self._generator, read, self._receive, looks)

    def _receive(self, blocks: Blocks, n: int) -> None:
        """Add the blocks of a pass whose backward pass has ended."""
        self._n += n
        self._seen = True
        for name, block in blocks.items():
            if name in self._sums:
                before, m = self._sums[name]
                self._sums[name] = before.absorb(block), m + n
            else:
                self._sums[name] = block, n


class _Hook:
    """Calls a method as long as its object lives. Copies, and what files hold, do nothing."""

    def __init__(self, method: Callable[..., None] | None = None):
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        """Call it; not where a compiler reads the model, which would take it for a part of that."""
        if torch.compiler.is_compiling():
            return
        method = None if self._method is None else self._method()
        if method is not None:
            method(*args)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        """One without a method."""
        return _Hook, ()


def _take_out(mode: Tape) -> None:
    """End a mode, which another that begins and ends with the same call may lie above."""
    if not any(mode is one for one in _get_current_function_mode_stack()):
        return  # whoever unwound the call after an error took it along
    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for one in reversed(above):
        _push_mode(one)


def _remove(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()
