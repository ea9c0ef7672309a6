"""What the first pass of a fit shows: whether outputs repeat, and belong to their examples alone.

A posterior holds for a function of the inputs. Evaluation that draws random numbers is none, and
where examples mix, each batch size has a posterior of its own.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kfac_laplace.curvature.gradients.example_copies import mixed_examples
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.repetition import SEEDS, Repetition, difference
from kfac_laplace.curvature.model.kept import without_trace
from kfac_laplace.curvature.model.random_states import ExtremeDraws, random_states_kept
from kfac_laplace.errors import UnsupportedUse

log = logging.getLogger("kfac_laplace")

#: Examples that are run alone to say by how much a mixing model is off.
EXAMPLES = 16


def examined(passed: ForwardPass) -> Knowledge:
    """What is known after a pass over data with targets; once a fit the model is checked.

    Outputs are compared with those of half the batch, in reverse order, and of the last example
    alone, both under random states of their own: together no more rows than the batch has.

    Raises:
        UnsupportedUse: outputs are random or change from call to call, or examples mix.
    """
    known, batch = passed.knowledge, passed.batch
    output = passed.recording.output
    single = int(passed.likelihood.of_pairs)
    interface = known.interface.after(batch.shapes, batch.n, output.ndim, single)
    if not interface.looked:
        warn_of_activation(passed.likelihood.activation(passed.output_rows))
    if not interface.checked or (interface.checked == 1 and batch.n > 1):
        again = Repetition(passed.knowing(replace(known, interface=interface)))
        model = passed.forward.model
        with without_trace(model), random_states_kept(passed.device), torch.no_grad():
            _check(again)
        interface = replace(interface, checked=batch.n)
    return replace(known, interface=replace(interface, looked=True))


def warn_of_activation(name: str) -> None:
    """Say that outputs went through a softmax or sigmoid; nothing for ""."""
    if name:
        log.warning(
            "the model's outputs look like those of a %s, but they are taken for logits: return "
            "logits from the model, without the %s at its end",
            name,
            name,
        )


def _check(again: Repetition) -> None:
    """Compare repetitions with the recorded outputs; at most as many rows as the batch has."""
    ran = False
    for seed, (part, output) in enumerate(_first_runs(again)):
        ran |= output is not None
        if again.off(part, output) > again.limit:
            _refuse(again, part, seed)
    if not ran:  # a model that runs on whole batches alone
        _compare(again, None, len(SEEDS))
    if again.draws:  # of no consequence so far: rare events may hide
        some = [0] if ran and again.n > 1 else None
        for seed in SEEDS:
            _compare(again, some, seed)
        for high in (False, True) if not again.seeds_itself(some) else ():
            if again.off(some, again.outputs(some, SEEDS[0], ExtremeDraws(high))) > again.limit:
                raise _random(f"outputs that depend on {'high' if high else 'low'} draws")


def _first_runs(again: Repetition) -> Iterator[tuple[list[int], Tensor | None]]:
    """Half of the examples in reverse order, and the last alone: an order of its own is kept."""
    half = list(range((again.n + 1) // 2))
    if again.n == 1:
        yield half, again.outputs(half, 0)
        return
    backwards = again.outputs(half[::-1], 0)
    if backwards is None and len(half) > 1:  # sorted, as packed sequences may have to be
        yield half, again.outputs(half, 0)
    else:
        yield half[::-1], backwards
    yield [again.n - 1], again.outputs([again.n - 1], 1)


def _compare(again: Repetition, part: list[int] | None, seed: int) -> None:
    if again.off(part, again.outputs(part, seed)) > again.limit:
        _refuse(again, part, seed)


def _refuse(again: Repetition, part: list[int] | None, seed: int) -> None:
    """Say why these examples do not give what they gave; but for rounding."""
    first, second = again.outputs(part, seed), again.outputs(part, seed)
    others = [again.outputs(part, other) for other in SEEDS]
    if first is None or second is None:
        return
    change = difference(first, second, again.limit)
    if change > again.limit:
        raise UnsupportedUse(
            "the forward pass is random in evaluation mode: outputs change from call to call",
            where="model",
            got=f"a difference of {change:.2e} under the same random state",
            remedy="Freeze what the model draws with a generator of its own, counts or updates "
            "from call to call",
        )
    changes = [difference(other, first, again.limit) for other in others if other is not None]
    if max(changes, default=0.0) > again.limit:
        raise _random(f"a difference of {max(changes):.2e} between two random states")
    alone = [[k] for k in range(min(again.n, EXAMPLES))] if again.n > 1 else []
    largest = max(again.off(one, again.outputs(one, seed)) for one in [part, *alone])
    if largest > again.rounding(part):
        raise mixed_examples(largest)


def _random(got: str) -> UnsupportedUse:
    return UnsupportedUse(
        "the forward pass is random in evaluation mode",
        where="model",
        got=got,
        remedy="Draw in training alone, as F.dropout(x, p, training=self.training) does, or freeze "
        "the noise in a buffer",
    )
