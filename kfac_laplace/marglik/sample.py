"""A few examples of the training data, kept to see how the model uses its parameters."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.batches import BatchFn, split_batch
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.curvature.shards import own_part
from kfac_laplace.options import check_iterable

#: Enough to tell which rows of a layer belong to which example, and what training mode mixes.
FEW = 8


@dataclass(frozen=True)
class Examples:
    """Inputs and targets.

    Args:
        x: inputs as the model takes them.
        y: targets.
    """

    x: Any
    y: Tensor


class KeepsFirst:
    """A loader whose first batch stays at hand after it was read.

    Args:
        loader: an iterable of batches.

    Raises:
        InvalidType: it is none.
    """

    def __init__(self, loader: Iterable[Any]):
        check_iterable("loader", loader)
        self._loader = loader
        self._first: Any = None

    def __iter__(self) -> Iterator[Any]:
        """The batches."""
        for batch in self._loader:
            if self._first is None:
                self._first = batch
            yield batch

    def few(self, network: Network, key_y: str, options: CurvatureOptions) -> Examples:
        """The first examples of the first batch, all of it where it cannot be divided.

        Of several processes, each of which reads a part, they are those of the first with data.

        Args:
            network: the model.
            key_y: name of the targets in mappings.
            options: of the curvature.
        """
        ranks = options.ranks
        if ranks is None:
            return self._few(network, key_y, options.batch_fn)

        def own() -> Any:
            few = None if self._first is None else self._few(network, key_y, options.batch_fn)
            return few and tree_map_only(Tensor, Tensor.cpu, (few.x, few.y))

        return Examples(*next(told for told in ranks.gathered(own) if told is not None))

    def _few(self, network: Network, key_y: str, batch_fn: BatchFn | None) -> Examples:
        x, y = split_batch(self._first, key_y, batch_fn)
        inputs = network.batch(x, len(y))
        if inputs.segments or len(y) != inputs.n or inputs.n <= FEW:
            return Examples(x, y)
        return Examples(inputs.select(torch.arange(FEW, device="cpu")).x, y[:FEW].clone())


def first_kept(loader: Iterable[Any], options: CurvatureOptions) -> KeepsFirst:
    """A loader whose first batch stays at hand; of several processes this one's part of the data.

    Raises:
        InvalidType: it is none.
        OtherRankFailed: that of another process is none.
    """
    ranks = options.ranks
    if ranks is None:
        return KeepsFirst(loader)
    return ranks.together(lambda: KeepsFirst(own_part(loader, ranks)))
