"""What do saved posteriors weigh, how long do they take, and what does rounding cost the evidence?

    python -m benchmarks.saving [--resnet] [--output FILE]

Fits the float32 networks of `benchmarks.precision` under K-FAC-expand and saves each as torch does,
as safetensors, and as safetensors with curvature rounded to float32. Of the latter, log det P −
log det P₀ after loading is compared with that before, in nats, for prior precisions from 1 down to
1e-4. `--resnet` takes torchvision's ResNet-18 alone, on a few random images. All factors are whole
before they are saved, as they are after large data, and not kept as few rows. Needs the extras
[demo], [safetensors] and, for `--resnet`, [zoo].
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.precision import PRECISIONS, cases
from kfac_laplace import Laplace
from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.states.files import write_text

#: Name of each way, its suffix and its options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": (".pt", {}),
    "safetensors": (".safetensors", {}),
    "float32": (".safetensors", {"dtype": torch.float32}),
}


def resnet() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, network, inputs and labels."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    yield "random, resnet18", model, torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))


def whole(la: Laplace) -> None:
    """Have sums in place of the rows that few data leave."""
    blocks = {
        name: KroneckerBlock.of(
            block.layout,
            Gram.of(block.inputs.matrices()),
            block.input_count,
            Gram.of(block.outputs.matrices()),
        )
        if isinstance(block, KroneckerBlock) and not block.has_diagonal_input
        else block
        for name, block in la.curvature.blocks.items()
    }
    la.curvature.ggn = replace(la.curvature.ggn, blocks=blocks)


def rows(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each way; for the rounded one also what the log-determinants move by."""
    la = Laplace(model, "classification", kfac_approx="expand", fisher="mc")
    la.fit(zip(x.split(100), y.split(100), strict=True))
    whole(la)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for way, (suffix, options) in WAYS.items():
        path = folder / f"posterior{suffix}"
        begin = time.process_time()
        la.save(path, **options)
        saved = time.process_time()
        again = Laplace.load(path, model)
        loaded = time.process_time()
        row = {"way": way, "weights MB": weights / 1e6, "MB": path.stat().st_size / 1e6}
        row |= {"save CPU s": saved - begin, "load CPU s": loaded - saved}
        small = weights < 4e7  # eigenvalues of larger ones take minutes
        for delta in PRECISIONS if way == "float32" and small else ():
            la.prior_precision = again.prior_precision = delta
            row[f"Δ log det, δ = {delta:g}"] = float(again.log_det_ratio - la.log_det_ratio)
            row[f"log det, δ = {delta:g}"] = float(la.log_det_ratio)
        yield row


def main() -> None:
    """Print a line for each network and way and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resnet", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, x, y in resnet() if options.resnet else cases():
            for row in rows(model, x, y, Path(folder)):
                told = (f"{k} {v:.4g}" for k, v in row.items() if not isinstance(v, str))
                print(name, row["way"], *told, flush=True)
                found.append({"network": name, **row})
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(found, indent=1) + "\n", options.output)


if __name__ == "__main__":
    main()
