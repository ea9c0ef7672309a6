"""The table of laplace-torch's lines: what it has of each, and the two libraries that run them.

A line is one form of a call in laplace-torch's documentation, with models and data of our own.
Imports are no lines: they are what is replaced. Enumerations stay laplace-torch's.
"""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laplace import marglik_training as their_training
from laplace.utils import subnetmask
from peers import peer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kfac_laplace import Laplace, marglik_training, subnetworks


@dataclass(frozen=True)
class Line:
    """One form of a call.

    Args:
        page: where laplace-torch has it.
        form: the call as its users write it.
        run: a function of a library that makes the call, and returns what it gives.
        says: for a line that does not work, what our error or warning says of the word to write.
        but: the error of another library in which it ends.
        apart: for a line that runs and gives another thing than there, what.
        same: what both libraries give alike: "values", or "shapes" where defaults, draws or
            searches differ; "" where laplace-torch's own line does not run.
        rtol: how far apart values may be.
    """

    page: str
    form: str
    run: Callable[[Any], Any]
    says: str = ""
    but: type[Exception] | None = None
    apart: str = ""
    same: str = "shapes"
    rtol: float = 1e-7

    @property
    def outcome(self) -> str:
        """What becomes of the line here."""
        return "says" if self.says else "neither" if self.but or self.apart else "works"


LINES: dict[str, Line] = {}


def line(page: str, form: str, **found: Any) -> Callable[[Callable[[Any], Any]], None]:
    """Enter a function in the table, under its name."""

    def enter(run: Callable[[Any], Any]) -> None:
        assert run.__name__ not in LINES
        LINES[run.__name__] = Line(page, form, run, **found)

    return enter


#: laplace-torch's dense GGN is a product with an identity in float32, whatever the model is in.
SINGLE = 1e-5

#: What laplace-torch does without being asked.
CONVENTIONS = {
    "joint_bias": False,
    "kfac_approx": "expand",
    "prior_structure": "scalar",
    "subset_of_weights": "last_layer",
}


def in_their_conventions(*args: Any, **options: Any) -> Laplace:
    """Our posterior with laplace-torch's defaults, where the line does not say otherwise."""
    return Laplace(*args, **{**CONVENTIONS, **options})


OURS = SimpleNamespace(Laplace=Laplace, marglik_training=marglik_training, masks=subnetworks)
ALIKE = SimpleNamespace(
    Laplace=in_their_conventions, marglik_training=marglik_training, masks=subnetworks
)
THEIRS = SimpleNamespace(
    Laplace=peer.laplace.Laplace, marglik_training=their_training, masks=subnetmask
)


def by_them(one: Line) -> Any:
    """What laplace-torch gives for a line. Its warnings are its own affair."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return one.run(THEIRS)


# --- models and data ---------------------------------------------------------------------------


def classes(n: int = 24) -> tuple[nn.Module, DataLoader, Tensor]:
    """A classifier of five numbers, its data, and a few inputs."""
    x, y = peer.data("classification", 5, n=n)
    return peer.mlp(), peer.loader(x, y), x[:4]


def curve() -> tuple[nn.Module, DataLoader, Tensor]:
    """A noisy sine, a network on it, and places to look at."""
    generator = torch.Generator().manual_seed(3)
    x = 8 * torch.rand(30, 1, dtype=torch.float64, generator=generator)
    y = x.sin() + 0.3 * torch.randn(30, 1, dtype=torch.float64, generator=generator)
    places = torch.linspace(-1, 9, 7, dtype=torch.float64)[:, None]
    return peer.mlp(1, 6, 1), peer.loader(x, y, 30), places


class Texts(nn.Module):
    """Scores every position and keeps the last that is no padding; takes the whole mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.score = nn.Linear(6, 2, bias=False)

    def forward(self, data: Any) -> Tensor:
        ids, mask = data["input_ids"], data["attention_mask"]
        found = self.embed(ids) * mask[..., None]
        counted = mask.cumsum(1).clamp_min(1)[..., None]
        scores = self.score(self.mix(found.cumsum(1) / counted).tanh())
        return scores[torch.arange(len(ids)), mask.sum(1) - 1]


def adapted() -> nn.Module:
    """The same with an adapter of peft beside one of its layers; the rest is frozen."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["mix"], bias="none")
    return peer.seeded(lambda: peft.get_peft_model(Texts(), config)).eval()


def texts() -> DataLoader:
    """Sentences of up to five tokens with labels, as tokenizers collate them."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(11, (12, 5), generator=generator)
    lengths = torch.randint(2, 6, (12,), generator=generator)
    mask = (torch.arange(5) < lengths[:, None]).long()
    rows = list(zip(ids, mask, torch.randint(2, (12,), generator=generator), strict=True))
    names = ("input_ids", "attention_mask", "labels")

    def collate(some: list[Any]) -> UserDict:
        return UserDict(
            {k: torch.stack(v) for k, v in zip(names, zip(*some, strict=True), strict=True)}
        )

    return DataLoader(rows, batch_size=5, collate_fn=collate)


def top_alone(model: nn.Module) -> nn.Module:
    """A network of texts of which the head alone can be trained."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.score.parameters():
        parameter.requires_grad = True
    return model


class Rewards(nn.Module):
    """Pairs (n, 2, d) in training, single inputs afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).reshape(len(x), -1)


def preferences() -> tuple[nn.Module, DataLoader, Tensor]:
    """A model of rewards, pairs with the place of the better one, and single inputs."""
    x, y = peer.data("classification", 2, 3, outputs=2)
    return peer.seeded(Rewards), peer.loader(x, y), x[:5, 0]


class Tokens(nn.Module):
    """Attention over positions and two numbers for each, from an entry of a mapping."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, num_heads=1, batch_first=batch_first)
        self.final_layer = nn.Linear(4, 2)

    def forward(self, data: Any) -> Tensor:
        x = data["input"]
        return self.final_layer(self.attn(x, x, x, need_weights=False)[0])


def tokens(batch_first: bool = True) -> tuple[nn.Module, DataLoader]:
    """Such a model, of which the head can be trained, and mappings with numbers at all positions.

    Their page leaves `batch_first` out: its attention is over the examples of a batch.
    """
    model = peer.seeded(lambda: Tokens(batch_first))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("final_layer")
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(8, 3, size, dtype=torch.float64, generator=generator) for size in (4, 2))
    rows = [{"input": a, "output": b} for a, b in zip(x, y, strict=True)]
    return model, DataLoader(rows, batch_size=4)
