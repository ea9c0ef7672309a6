"""Characters of the Python language reference, which ships with Python as `pydoc_data.topics`.

Under Python's licence (PSF-2.0); 370,000 characters in Python 3.11, other versions differ.
Paragraphs that occur twice are kept once, so that none is both learned and tested.
"""

import re
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from benchmarks.experiments.optimizers.task import Data, Rows, Size
from benchmarks.experiments.optimizers.transformer import LanguageModel

#: ASCII; whatever else occurs becomes a question mark.
TOKENS = 128
#: Part of the paragraphs that is validated on, and that is tested on.
HELD_OUT = 0.1


@lru_cache(maxsize=1)
def corpora() -> tuple[Tensor, Tensor, Tensor]:
    """Characters to learn from, to validate on and to test on, each (length,)."""
    from pydoc_data.topics import topics

    texts = (topics[name].encode("ascii", errors="replace") for name in sorted(topics))
    pieces = (part.strip(b"\n") for text in texts for part in re.split(rb"\n\s*\n", text))
    paragraphs = list(dict.fromkeys(part for part in pieces if part))
    order = torch.randperm(len(paragraphs), generator=Generator().manual_seed(0)).tolist()
    few = round(HELD_OUT * len(paragraphs))
    train, validation, test = (
        torch.tensor(list(b"\n\n".join(paragraphs[k] for k in part)))
        for part in (order[2 * few :], order[:few], order[few : 2 * few])
    )
    return train, validation, test


def data(size: Size, device: str, folder: object = None) -> Data:
    """Texts of `side` characters, each with the next one as its label at every place.

    Those to learn from start anywhere, the others lie one after another, as many as there are.
    """
    train, *held_out = corpora()
    starts = torch.randint(
        len(train) - size.side, (size.train,), generator=Generator().manual_seed(0)
    )
    others = [torch.arange(0, len(part) - size.side, size.side) for part in held_out]
    found = [_windows(train, starts, size.side, device)]
    for part, places in zip(held_out, others, strict=True):
        found.append(_windows(part, places[: size.held_out], size.side, device))
    return Data(*found)


def _windows(text: Tensor, starts: Tensor, length: int, device: str) -> Rows:
    """Pieces of a text, and the same moved by one character."""
    rows = text[starts[:, None] + torch.arange(length + 1)].to(device)
    return Rows(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def network(size: Size) -> nn.Module:
    """A small GPT."""
    return LanguageModel(TOKENS, size.side, size.width, size.depth)
