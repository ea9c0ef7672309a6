"""What do the parameters without Kronecker factors cost?

    python -m benchmarks.exact_share [--repeats N] [--examples N] [--output FILE]

Fits K-FAC to one batch for torchvision's ResNet-18 (32 × 32 images, batch norm in evaluation mode)
and for its VisionTransformer (width 192, 4 blocks, 65 tokens), both with ten classes and every
weight trainable: once with all parameters, and once with those alone that have Kronecker factors.
The difference is the share of norms, class token and position embedding, which have exact blocks.
The number of parameters that need per-example gradients of the whole model comes with it. Fits take
turns; medians of CPU seconds, to which other programs on the machine add little. Needs torchvision.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer, resnet18

from kfac_laplace import Curvature
from kfac_laplace.states.files import write_text

Row = dict[str, float | int | str]
CLASSES = 10
NETWORKS = {
    "ResNet-18": lambda: resnet18(num_classes=CLASSES),
    "ViT": lambda: VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=4,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=CLASSES,
    ),
}


def main() -> None:
    """Print a line for each setting and write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for row in measure(options.examples, options.repeats):
        cells = [f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()]
        print("  ".join(cells), flush=True)
        rows.append(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"threads": torch.get_num_threads(), "examples": options.examples, "rows": rows}
        write_text(json.dumps(content, indent=1) + "\n", options.output)


def measure(examples: int, repeats: int) -> Iterator[Row]:
    """One row for each network, Fisher and setting."""
    for network, make in NETWORKS.items():
        torch.manual_seed(0)
        model = make()
        x = torch.randn(examples, 3, 32, 32)
        y = torch.randint(0, CLASSES, (examples,))
        for fisher in ("exact", "mc"):
            for setting in ("expand", "reduce"):
                found = shares(model, (x, y), {"fisher": fisher, "kfac_approx": setting}, repeats)
                yield {"network": network, "fisher": fisher, "setting": setting, **found}


def shares(
    model: nn.Module, batch: tuple[Tensor, Tensor], options: dict[str, str], repeats: int
) -> Row:
    """Median CPU seconds of both kinds of fit, and the share of the exact blocks.

    Both know the groups and row layouts from a fit before: what is timed is a batch.
    """
    everything = Curvature(model, "classification", **options).fit([batch])
    kinds = everything.coverage
    subset = [name for name, kind in kinds.items() if kind == "kron"]
    kronecker = Curvature(model, "classification", subset_of_weights=subset, **options).fit([batch])
    loose = {p for g in everything.groups if g.role == "generic" for p in g.layout.params}
    seconds: dict[str, list[float]] = {"all": [], "kron": []}
    for _ in range(repeats):
        for name, curvature in (("all", everything), ("kron", kronecker)):
            start = time.process_time()
            curvature.empty().fit([batch])
            seconds[name].append(time.process_time() - start)
    whole, rest = median(seconds["all"]), median(seconds["kron"])
    return {
        "seconds": whole,
        "seconds_kronecker_alone": rest,
        "exact_share": 1 - rest / whole,
        "exact_parameters": len(kinds) - len(subset),
        "per_example_fallback_parameters": len(loose),
    }


if __name__ == "__main__":
    main()
