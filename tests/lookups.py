"""Models of tokens that look entries up in a table, and their twins with one-hot rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from cases import BATCH_SIZES, N_DATA, Case
from torch import Tensor, nn

SIZE, WIDTH, T, CLASSES = 6, 3, 4, 3  # the last entry is never looked up
PADDING = 2


class Indexed(nn.Module):
    """A table used as `table[index]`, whose entries have any shape."""

    def __init__(self, *shape: int, offset: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, *shape))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x + self.offset].reshape(*x.shape, -1)


class OneHotLinear(nn.Module):
    """The same lookup as a linear layer of one-hot rows; rows of `padding` pass nothing back."""

    def __init__(self, weight: Tensor, padding: int | None):
        super().__init__()
        self.table = nn.Linear(len(weight), weight[0].numel(), bias=False)
        self.table.weight = nn.Parameter(weight.detach().reshape(len(weight), -1).T.clone())
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        rows = nn.functional.one_hot(x.long(), self.table.in_features)
        out = self.table(rows.to(self.table.weight.dtype))
        if self.padding is None:
            return out
        return torch.where((x == self.padding)[..., None], out.detach(), out)


class Words(nn.Module):
    """lookup -> linear -> tanh -> mean over the words -> head."""

    def __init__(self, lookup: nn.Module, width: int = WIDTH):
        super().__init__()
        self.lookup = lookup
        self.mix = nn.Linear(width, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.lookup(x)).tanh().mean(1))


class Translation(nn.Module):
    """Encoder and decoder with one table: the first words are the source, the last the target."""

    def __init__(self, lookup: nn.Module):
        super().__init__()
        self.lookup = lookup
        self.source, self.target = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        source = self.source(self.lookup(x[:, :2])).tanh().mean(1, keepdim=True)
        target = self.target(self.lookup(x[:, 2:])).sin()
        return self.head((source * target).mean(1))


class TiedWords(nn.Module):
    """A language model in miniature, its head the table; one output row an example."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.lookup = nn.Embedding(SIZE, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, SIZE, bias=False)
        self.head.weight = self.lookup.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.lookup(x)).tanh().mean(1))


#: Lookups by name, and the entry that does not count.
LOOKUPS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "embedding": (lambda: nn.Embedding(SIZE, WIDTH), None),
    "padding": (lambda: nn.Embedding(SIZE, WIDTH, padding_idx=PADDING), PADDING),
    "negative-padding": (
        lambda: nn.Embedding(SIZE, WIDTH, padding_idx=PADDING - SIZE),
        PADDING,
    ),
    "indexed": (lambda: Indexed(WIDTH), None),
    "indexed-from-the-end": (lambda: Indexed(WIDTH, offset=-SIZE), None),
    "indexed-matrices": (lambda: Indexed(1, WIDTH), None),
}


def words(model: nn.Module, dtype: torch.dtype = torch.long) -> Case:
    """A case over random words; the second example is padding alone, the first in part."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))  # padding entries as well
    x = torch.randint(0, SIZE - 1, (N_DATA, T))
    x[0, 1:3] = PADDING
    x[1] = PADDING
    x[2] = torch.tensor([1, 1, 3, 1])
    y = torch.randint(0, CLASSES, (N_DATA,))
    x = x.to(dtype)
    batches = list(zip(x.split(BATCH_SIZES), y.split(BATCH_SIZES), strict=True))
    return Case(model, "classification", batches)


def lookup_case(name: str, body: type[nn.Module] = Words) -> Case:
    """A model around a lookup of the table above, with the same weights and data each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return words(body(LOOKUPS[name][0]()))


def twin(example: Case, padding: int | None) -> Case:
    """The same model with one-hot rows in place of the lookup, under `lookup.table`."""
    model = copy.deepcopy(example.model)
    (weight,) = model.lookup.parameters()
    model.lookup = OneHotLinear(weight, padding)
    return Case(model, example.likelihood, example.batches)
