"""What a plan is asked about: a batch in any of the forms in which users have one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from kfac_laplace.curvature.model.batches import BatchFn, split_batch
from kfac_laplace.curvature.model.graphs import is_graph
from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_whole
from kfac_laplace.process import draws_kept


@dataclass(frozen=True)
class Asked:
    """A batch, and how many examples a fit will have.

    Args:
        x: inputs.
        y: targets.
        n_data: examples; None: those of the batch.
    """

    x: Any
    y: Tensor
    n_data: int | None


def asked(
    x: Any, y: Tensor | None, n_data: int | None, key_y: str, batch_fn: BatchFn | None
) -> Asked:
    """The batch and the number of examples that are meant.

    Args:
        x: inputs; without y a batch as a loader yields it, or a loader.
        y: targets.
        n_data: number of examples, where it is given.
        key_y: name of the targets in mappings.
        batch_fn: takes a batch to (x, y).

    Raises:
        InvalidValue: a loader without batches, or one that can be read only once; n_data below 1.
    """
    if n_data is not None:
        check_whole("n_data", n_data, 1)
    if y is not None:
        found = Asked(*split_batch((x, y), key_y), n_data)
    elif is_loader(x):
        given = n_data if n_data is not None else _examples(x, key_y, batch_fn)
        found = Asked(*split_batch(_first(x), key_y, batch_fn), given)
    else:
        found = Asked(*split_batch(x, key_y, batch_fn), n_data)
    if found.y.ndim and not len(found.y):
        raise InvalidValue(
            "a batch without examples", where="plan", got="0 examples", remedy="Give another one"
        )
    return found


def is_loader(x: Any) -> bool:
    """Whether something yields batches: an iterable that is none itself, or a list of batches."""
    if isinstance(x, Tensor | Mapping | str) or is_graph(x) or not isinstance(x, Iterable):
        return False
    if isinstance(x, Sequence):
        return not len(x) or all(
            isinstance(batch, Mapping)
            or is_graph(batch)
            or (isinstance(batch, list | tuple) and len(batch) == 2 and len(x) != 2)
            or (isinstance(batch, list | tuple) and _ends_in_targets(batch))
            for batch in x
        )
    return True


def _ends_in_targets(batch: Sequence[Any]) -> bool:
    return len(batch) == 2 and isinstance(batch[1], Tensor)


def _first(loader: Iterable[Any]) -> Any:
    """The first batch; no generator is moved by it."""
    with _draws_kept(loader):
        batches = iter(loader)
        if batches is loader:
            raise InvalidValue(
                "its batches can be read only once, and are wanted for the fit",
                where="plan",
                got=type(loader).__name__,
                remedy="Give one batch, plan(x, y, n_data=...), or a loader",
            )
        for batch in batches:
            return batch
    raise InvalidValue("the loader yielded no batch", where="plan", got="0 batches")


@contextmanager
def _draws_kept(loader: Any) -> Iterator[None]:
    """Put back the random states that reading a loader moves."""
    owners = (loader, getattr(loader, "sampler", None))
    found = {id(g): g for owner in owners if (g := getattr(owner, "generator", None)) is not None}
    generators = [g for g in found.values() if isinstance(g, Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        with draws_kept():
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _examples(loader: Any, key_y: str, batch_fn: BatchFn | None) -> int | None:
    """How many examples a loader has, where it can tell."""
    if isinstance(loader, Sequence):
        return sum(len(split_batch(batch, key_y, batch_fn)[1]) for batch in loader) or None
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):
        return None
