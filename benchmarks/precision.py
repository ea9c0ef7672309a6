"""What do products in float32 cost the evidence?

    python -m benchmarks.precision [--output FILE]

Fits float32 networks under K-FAC-expand with the three choices of `factor_dtype` and compares
log det P − log det P₀ with the one from sums in float64, in nats, for prior precisions from 1 down
to 1e-4. The digits networks are trained on 200 images. Inputs of LayerNorm's outputs are
rank-deficient, and so are those of a network whose two input channels are the same. Needs the extra
[demo].
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Size, build, draw
from kfac_laplace import Laplace
from kfac_laplace.demo import classification
from kfac_laplace.demo.methods import default_map
from kfac_laplace.demo.problem import Problem
from kfac_laplace.demo.settings import Settings
from kfac_laplace.states.files import write_text

PRECISIONS = (1.0, 1e-2, 1e-4)
CHOICES = ("auto", torch.float32)


def twice(channels: int = 16) -> nn.Module:
    """A small convolutional network for images of two channels that are the same."""
    return nn.Sequential(
        nn.Conv2d(2, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def cases() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Name, network, inputs and labels."""
    settings = Settings(seeds=1)
    for name in settings.models:
        problem = Problem(name, classification.draw(settings, 0), settings, 0)
        data = problem.data.train
        yield f"digits, {name}", default_map(problem).model, data.x, data.y
    images = classification.draw(settings, 0).train
    torch.manual_seed(0)
    yield "digits, each channel twice", twice(), images.x.repeat(1, 2, 1, 1), images.y
    for network in ("wrn", "vit"):
        x, y = draw(network, 64, 10, Size())
        yield f"random, {network}", build(network, 10, Size()), x, y


def errors(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[dict[str, Any]]:
    """One row for each prior precision."""
    fitted = {
        choice: Laplace(
            model, "classification", kfac_approx="expand", fisher="mc", factor_dtype=choice
        ).fit(zip(x.split(32), y.split(32), strict=True))
        for choice in (torch.float64, *CHOICES)
    }
    for delta in PRECISIONS:
        for la in fitted.values():
            la.prior_precision = delta
        want = float(fitted[torch.float64].log_det_ratio)
        found = {str(c): float(fitted[c].log_det_ratio) - want for c in CHOICES}
        yield {"prior precision": delta, "log-determinant": want, **found}


def main() -> None:
    """Print a line for each network and precision and write all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name, model, x, y in cases():
        for row in errors(model, x, y):
            print(name, " ".join(f"{key} {value:.6g}" for key, value in row.items()), flush=True)
            rows.append({"network": name, **row})
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


if __name__ == "__main__":
    main()
