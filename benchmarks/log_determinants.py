"""How well do Kronecker factors know the log-determinant of the GGN?

    python -m benchmarks.log_determinants [--seeds N] [--output FILE]

Trains the demo's two networks on 200 digits, with the default weight decay and tuned online, and
compares log det P − log det P₀ of the same weights and prior by four curvatures: the exact GGN, the
exact GGN without its blocks between layers, K-FAC-reduce (keys take expand) and K-FAC-expand. The
exact ones are computed in dual form, as log det(I + τ Λ^½ J P₀⁻¹ Jᵀ Λ^½) over all outputs. Needs
the extra [demo].
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.demo.classification import draw
from kfac_laplace.demo.methods import default_map, online_default
from kfac_laplace.demo.problem import Problem
from kfac_laplace.demo.settings import Settings
from kfac_laplace.posterior.predict.glm import output_features
from kfac_laplace.states.files import write_text

Row = dict[str, float | int | str]


def main() -> None:
    """Print a line for each network and write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for row in measure(Settings(seeds=options.seeds)):
        print(" ".join(f"{k} {v:.0f}" if isinstance(v, float) else str(v) for k, v in row.items()))
        rows.append(row)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


def measure(settings: Settings) -> Iterator[Row]:
    """One row for each network, way of training and seed."""
    for name in settings.models:
        for seed in range(settings.seeds):
            problem = Problem(name, draw(settings, seed), settings, seed)
            data = problem.data.train
            fit = default_map(problem)
            for delta in (2.0, 20.0):
                found = log_det_ratios(fit.model, data.x, data.y, torch.tensor(delta))
                yield {"network": name, "training": f"MAP, δ = {delta:g}", "seed": seed, **found}
            tuned = online_default(problem)
            assert tuned.tuner is not None
            precision = tuned.tuner.hyperparameters()["prior_precision"]
            found = log_det_ratios(tuned.model, data.x, data.y, precision)
            yield {"network": name, "training": "online, its δ", "seed": seed, **found}


def log_det_ratios(model: nn.Module, x: Tensor, y: Tensor, precision: Tensor) -> dict[str, float]:
    """log det P − log det P₀ by four curvatures, in nats."""
    ratios: dict[str, float] = {}
    fitted = {}
    for label, setting in (("reduce", "auto"), ("expand", "expand")):
        la = Laplace(model, "classification", kfac_approx=setting, prior_precision=precision)
        fitted[label] = la.fit([(x, y)])
    kernels = prior_kernels(fitted["reduce"], x)
    root = curvature_root(model, x)
    ratios["exact"] = dual_log_det(torch.stack(kernels).sum(0), root)
    ratios["exact block-diagonal"] = sum(dual_log_det(kernel, root) for kernel in kernels)
    ratios |= {f"kron-{label}": float(la.log_det_ratio) for label, la in fitted.items()}
    return ratios


def prior_kernels(la: Laplace, x: Tensor) -> list[Tensor]:
    """J_b P₀⁻¹ J_bᵀ (n c, n c) of each block b."""
    prior = la.posterior.without_data()
    batch = la.curvature.network.batch(x)
    features = [block.double() for block in output_features(prior, batch)]
    return [block @ block.mT for block in features]


def curvature_root(model: nn.Module, x: Tensor) -> Tensor:
    """Block-diagonal root (n c, n c) of Λ at the network's outputs."""
    with torch.no_grad():
        p = model(x).double().softmax(-1)
    values, basis = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    return torch.block_diag(*(basis * values.clamp_min(0).sqrt()[:, None]))


def dual_log_det(kernel: Tensor, root: Tensor) -> float:
    """log det(I + rootᵀ kernel root)."""
    inner = root.mT @ kernel @ root
    factor = torch.linalg.cholesky(inner + torch.eye(len(inner)).to(inner))
    return 2 * float(factor.diagonal().log().sum())


if __name__ == "__main__":
    main()
