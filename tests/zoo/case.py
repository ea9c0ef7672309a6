"""What a member of the zoo is: a tiny float64 model, its data, and how its parameters are treated.

`build(name)` makes a fresh, seeded `ZooCase`; a file of models registers builders with `zoo_case`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

BATCH_SIZES = (3, 3, 1)
N_DATA = sum(BATCH_SIZES)
IGNORED = -100  # the label that torch's own losses leave out

Example = Any
Batch = Any


@dataclass(frozen=True)
class ZooCase:
    """A model as a user would hand it over, with seven examples.

    Args:
        model: float64, in evaluation mode, every parameter away from zero.
        likelihood: "classification", "regression" or "binary".
        examples: single examples, which `collate` joins into what a loader yields.
        treatment: parameter-name patterns to the expected coverage; the first match counts.
        rows: module-name patterns to how the rows of the layer's output lie: "batch" (the first
            axis runs over examples, alone or as the slowest index of a flattened axis), "second",
            "nodes" or "edges" (by the graphs' batch vector).
        collate: joins examples.
        pair: takes what the loader yields to (inputs, targets).
        options: what `Laplace` needs to know beside the model, such as `forward_fn`.
        tolerance: relative error of a comparison: `laws.EXACT` in float64, more where the model
            itself computes in float32.
        notes: what this case is there for.
    """

    name: str
    model: nn.Module
    likelihood: str
    examples: Sequence[Example]
    treatment: Mapping[str, str]
    rows: Mapping[str, str] = field(default_factory=dict)
    collate: Callable[[Sequence[Example]], Batch] = default_collate
    pair: Callable[[Batch], tuple[Any, Tensor]] = lambda batch: (batch[0], batch[1])
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-10
    notes: str = ""

    def batches(self, sizes: Sequence[int] = BATCH_SIZES) -> list[Batch]:
        """A loader: all examples in batches of the given sizes."""
        parts, start = [], 0
        for size in sizes:
            parts.append(self.collate(self.examples[start : start + size]))
            start += size
        assert start == len(self.examples)
        return parts

    @property
    def data(self) -> tuple[Any, Tensor]:
        """All inputs and targets as one batch."""
        return self.pair(self.collate(self.examples))

    def forward(self, x: Any, model: nn.Module | None = None) -> Tensor:
        """The output of the model (or of a twin of it), before any reshaping."""
        model = self.model if model is None else model
        if "forward_fn" in self.options:
            return self.options["forward_fn"](model, x)
        output = model(**x) if isinstance(x, Mapping) else model(x)
        return getattr(output, "logits", output)

    def treated(self, name: str) -> str:
        """The expected coverage of a parameter."""
        if not self.model.get_parameter(name).requires_grad:
            return "frozen"
        return next(kind for glob, kind in self.treatment.items() if fnmatchcase(name, glob))

    def layout(self, module: str) -> str:
        """How the rows of a layer lie."""
        return next((w for glob, w in self.rows.items() if fnmatchcase(module, glob)), "batch")


BUILDERS: dict[str, Callable[[], ZooCase]] = {}


def zoo_case(build: Callable[[str], ZooCase]) -> Callable[[str], ZooCase]:
    """Register a builder under its own name with dashes; it is called with that name."""
    name = build.__name__.replace("_", "-")
    BUILDERS[name] = lambda: build(name)
    return build


def build(name: str) -> ZooCase:
    """A fresh copy of a case; the global RNG is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        return BUILDERS[name]()


def lively(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with parameters and statistics drawn anew.

    Fresh models are full of zeros and ones (biases, norm scales, the up-projections of adapters),
    under which many errors do not show.
    """
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter[0].numel() == 1:
                parameter.uniform_(0.2, 1.0)  # positive: few rectifiers die
            else:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def labelled(inputs: Tensor, classes: int, *axes: int) -> list[tuple[Tensor, Tensor]]:
    """Examples of inputs (n, ...) with random labels (n, *axes)."""
    return list(zip(inputs, torch.randint(0, classes, (len(inputs), *axes)), strict=True))
