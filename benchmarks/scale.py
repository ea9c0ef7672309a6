"""How time and memory of a fit grow, and what three large networks would take.

    python -m benchmarks.scale [--parts curves,large] [--output FILE]

One thread. Curves: a base network of which one size at a time is varied, planned and fitted: number
of examples N, of outputs C, of shared positions T, width and depth. Large networks are planned on
the meta device, which takes no memory; all of what is said of them is calculated: operations and
bytes by the library's own counts, seconds at the rate at which this machine multiplies matrices,
and at one that is stated for an accelerator.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Kron, Laplace
from kfac_laplace.planning.timing import product_rate

MIB = 1024**2
#: Operations a second, stated and not measured: float32 by the tensor cores of a data-centre GPU,
#: of whose 4e14 dense TF32 operations (a vendor's figure) a quarter is taken.
ACCELERATOR = 1e14


@dataclass(frozen=True)
class Sizes:
    """What the curves vary.

    Args:
        examples: N.
        outputs: C.
        positions: T.
        width: of tokens.
        depth: layers.
    """

    examples: int = 256
    outputs: int = 10
    positions: int = 16
    width: int = 96
    depth: int = 2


CURVES: dict[str, tuple[int, ...]] = {
    "examples": (64, 256, 1024),
    "outputs": (3, 10, 30, 300),
    "positions": (4, 16, 64),
    "width": (48, 96, 192, 384),
    "depth": (1, 2, 4, 8),
}


class Tokens(nn.Module):
    """Rows (n, t, w) through layers of one width, their mean to logits (n, c)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(sizes.width, sizes.width) for _ in range(sizes.depth))
        self.head = nn.Linear(sizes.width, sizes.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x.mean(1))


def curves() -> list[dict[str, Any]]:
    """Planned and measured, a row for each size."""
    rows = []
    for name, values in CURVES.items():
        for value in values:
            sizes = replace(Sizes(), **{name: value})
            torch.manual_seed(0)
            model = Tokens(sizes)
            x = torch.randn(sizes.examples, sizes.positions, sizes.width)
            y = torch.randint(sizes.outputs, (sizes.examples,))
            data = list(zip(x.split(64), y.split(64), strict=True))
            options: dict[str, Any] = {"kfac_approx": "expand"}
            plan = Laplace(model, "classification", **options).plan(data)
            Laplace(model, "classification", **options).fit(data[:1])
            start = perf_counter()
            la = Laplace(model, "classification", **options).fit(data)
            seconds = perf_counter() - start
            held = [t for block in la.curvature.blocks.values() for t in block.tensors().values()]
            rows.append(
                {
                    "varied": name,
                    "value": value,
                    "vectors": plan.vectors,
                    "operations": plan.operations,
                    "planned_seconds": plan.seconds,
                    "seconds": seconds,
                    "planned_peak_mib": plan.memory.peak / MIB,
                    "planned_factors_mib": plan.memory.factors / MIB,
                    "factors_mib": sum(t.numel() * t.element_size() for t in held) / MIB,
                    "decompositions_mib": plan.memory.decompositions / MIB,
                    "bases_mib": plan.memory.bases / MIB,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with batch norm, around a shortcut."""

    def __init__(self, i: int, width: int, stride: int):
        super().__init__()
        o = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        same = i == o and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, i, h, w) to (n, 4 width, h / stride, w / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """25.6 M parameters, for images (n, 3, 224, 224) and 1,000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for k in range(blocks):
            layers.append(Bottleneck(channels, 64 << stage, 2 if stage and not k else 1))
            channels = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    """Pre-norm self-attention and a perceptron of four times the width, plain projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width)."""
        h = self.first(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


class VisionTransformer(nn.Module):
    """ViT-L/16: 24 blocks of width 1,024 on 14×14 patches and a class token."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16, classes: int = 1000):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, 224, 224) to logits."""
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Adapted(nn.Module):
    """A frozen projection with a trained product of low rank beside it."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """W x + B A x."""
        return self.base(x) + self.b(self.a(x))


class Decoder(nn.Module):
    """A block of a Llama-shaped decoder, adapters on the four attention projections."""

    def __init__(self, width: int, heads: int, hidden: int, rank: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (Adapted(width, rank) for _ in range(4))
        self.first = nn.RMSNorm(width).requires_grad_(False)
        self.second = nn.RMSNorm(width).requires_grad_(False)
        self.gate, self.up = (
            nn.Linear(width, hidden, bias=False).requires_grad_(False) for _ in range(2)
        )
        self.down = nn.Linear(hidden, width, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t, width)."""
        h = self.first(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Language(nn.Module):
    """6.7 G frozen parameters, as Llama 2 7B has them, to the last token's 32,000 logits."""

    def __init__(self, depth: int = 32, rank: int = 16):
        super().__init__()
        width, words = 4096, 32000
        self.table = nn.Embedding(words, width).requires_grad_(False)
        self.blocks = nn.Sequential(*(Decoder(width, 32, 11008, rank) for _ in range(depth)))
        self.norm = nn.RMSNorm(width).requires_grad_(False)
        self.head = nn.Linear(width, words, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t) to logits (n, 32000) of the next."""
        return self.head(self.norm(self.blocks(self.table(x))[:, -1]))


def large() -> list[dict[str, Any]]:
    """A row for each network and choice of vectors, all of it calculated."""
    rate = product_rate(torch.device("cpu"), torch.float32)
    rows = []
    for name, make, n_data, inputs in (
        ("ResNet-50", resnet50, 1_281_167, (32, 3, 224, 224)),
        ("ViT-L/16", VisionTransformer, 1_281_167, (32, 3, 224, 224)),
        ("7 B decoder, LoRA rank 16", Language, 10_000, (1, 512)),
    ):
        with torch.device("meta"):
            model = make()
            x = torch.empty(inputs, dtype=torch.float32 if len(inputs) == 4 else torch.long)
            y = torch.empty(inputs[0], dtype=torch.long)
        for fisher, structure in (("exact", "kron"), ("mc", "kron"), ("mc", Kron())):
            la = Laplace(model, "classification", fisher=fisher, hessian_structure=structure)
            plan = la.plan(x, y, n_data=n_data, rate=rate)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows.append(
                {
                    "network": name,
                    "fisher": fisher,
                    "structure": str(structure),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "random_parameters": trained,
                    "n_data": n_data,
                    "batch": inputs[0],
                    "vectors": plan.vectors,
                    "operations": plan.operations,
                    "later_operations": sum(part.operations for part in plan.later),
                    "peak": plan.memory.peak,
                    "factors": plan.memory.factors,
                    "decompositions": plan.memory.decompositions,
                    "bases": plan.memory.bases,
                    "rate_here": rate,
                    "days_here": plan.seconds / 86400,
                    "rate_accelerator": ACCELERATOR,
                    "days_accelerator": plan.seconds * rate / ACCELERATOR / 86400,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Print a line for each row and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="curves,large")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"curves": curves, "large": large}
    there = options.output is not None and options.output.exists()
    known = json.loads(options.output.read_text()) if there else {}
    found = known | {name: parts[name]() for name in options.parts.split(",")}
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
