"""Tables of numbers for networks: standardised columns, shuffled batches, a perceptron."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kfac_laplace.errors import InvalidValue
from kfac_laplace.options import check_choice, check_whole

Table = NDArray[np.floating]

#: What may stand between the layers of a perceptron.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
#: Training steps that a table gets at least, and epochs, where nobody says how many.
STEPS, EPOCHS = 1000, 50


@dataclass(frozen=True)
class Columns:
    """Location and scale of each column, in float64 whatever the data are in.

    Args:
        mean: shape (d,).
        scale: shape (d,), standard deviations; 1 for a column that is constant.
    """

    mean: Table
    scale: Table

    @classmethod
    def of(cls, table: Table, standardize: bool = True) -> "Columns":
        """Those of a table (n, d); zeros and ones where it is to stay as it is."""
        table = table.astype(np.float64)
        if not standardize:
            return cls(np.zeros(table.shape[1]), np.ones(table.shape[1]))
        scale = table.std(0)
        # The rounding of a mean makes constants vary by an eps or two.
        constant = scale <= 10 * np.finfo(np.float64).eps * np.abs(table).max(0)
        return cls(table.mean(0), np.where(constant, 1.0, scale))

    def standardized(self, table: Table) -> Table:
        """(table − mean)/scale, float64."""
        return (table.astype(np.float64) - self.mean) / self.scale


@dataclass(frozen=True)
class Shuffled:
    """Batches in another order at each reading, of sizes that differ by one at most.

    Args:
        x: inputs (n, d).
        y: targets (n, ...).
        batch_size: largest number of examples in a batch.
        generator: source of the orders.
    """

    x: Tensor
    y: Tensor
    batch_size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator, device="cpu").to(
            self.x.device
        )
        for chosen in order.tensor_split(len(self)):
            yield self.x[chosen], self.y[chosen]


def perceptron(
    n_features: int, n_outputs: int, hidden: Sequence[int] = (50, 50), activation: str = "silu"
) -> nn.Sequential:
    """Linear layers with an activation between them.

    Args:
        n_features: width of the inputs.
        n_outputs: width of the outputs.
        hidden: widths in between; none of them for a linear model.
        activation: one of `ACTIVATIONS`.

    Raises:
        InvalidValue: an unknown activation, or a width below 1.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if isinstance(hidden, str) or not isinstance(hidden, Sequence | np.ndarray):
        hidden = (hidden,)
    for width in hidden:
        check_whole("hidden_layer_sizes", width, 1)
    layers: list[nn.Module] = []
    for width in map(int, hidden):
        layers += [nn.Linear(n_features, width), ACTIVATIONS[activation]()]
        n_features = width
    return nn.Sequential(*layers, nn.Linear(n_features, n_outputs))


def epochs_for(batches: int) -> int:
    """Epochs of so many batches in which a network sees `STEPS` of them, at least `EPOCHS`."""
    return max(EPOCHS, math.ceil(STEPS / batches))


def resolved_dtype(dtype: object, given: np.dtype) -> torch.dtype:
    """The dtype of networks for a table: a name, a torch.dtype, or None for the table's own.

    Raises:
        InvalidValue: neither float32 nor float64.
    """
    if dtype is None:
        return torch.float32 if given == np.float32 else torch.float64
    for known in (torch.float32, torch.float64):
        if dtype is known or dtype == str(known).removeprefix("torch."):
            return known
    raise InvalidValue(
        "networks are trained in float32 or float64",
        where="dtype",
        got=repr(dtype),
        remedy="Pass 'float32', 'float64', or None for the dtype of X",
    )
