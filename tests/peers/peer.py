"""The peers' side of a comparison, with tiny float64 models and data.

Importing this module skips the test file where laplace-torch is not installed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("asdl", reason="asdfghjkl (module asdl) is not installed")
laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
curvature = pytest.importorskip("laplace.curvature")

BACKENDS = {"curvlinops": curvature.CurvlinopsGGN, "asdl": curvature.AsdlGGN}


def seeded(build, seed: int = 1):
    """What `build()` makes from its own seed, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().double()


def data(likelihood: str, *shape: int, outputs: int = 3, n: int = 24) -> tuple[Tensor, Tensor]:
    """Standard-normal inputs (n, *shape) with labels (n,) or values (n, outputs)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    if likelihood == "classification":
        return x, torch.randint(outputs, (n,), generator=generator)
    return x, torch.randn(n, outputs, dtype=torch.float64, generator=generator)


def loader(x: Tensor, y: Tensor, batch_size: int = 7, **options) -> DataLoader:
    """A data loader whose last batch is smaller."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, **options)


def mlp(inputs: int = 5, hidden: int = 6, outputs: int = 3) -> nn.Module:
    """Linear, tanh, linear."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    )


def cnn() -> nn.Module:
    """Two plain convolutions, zero padding, pooling between, for inputs (n, 2, 6, 6)."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(3, 4, 2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )


def fit(model: nn.Module, likelihood: str, batches, structure: str = "kron", **options):
    """laplace-torch's posterior over all weights; `backend` is "curvlinops" unless given."""
    backend = BACKENDS[options.pop("backend", "curvlinops")]
    la = laplace.Laplace(
        model,
        likelihood,
        subset_of_weights="all",
        hessian_structure=structure,
        backend=backend,
        **options,
    )
    la.fit(batches)
    return la


def hessian(la) -> Tensor:
    """laplace-torch's H (P, P) at sigma = 1, prior taken off."""
    la.prior_precision = 1.0
    precision = la.posterior_precision
    if hasattr(precision, "to_matrix"):
        precision = precision.to_matrix()
    precision = precision.diag() if precision.ndim == 1 else precision
    return precision - torch.eye(len(precision), dtype=precision.dtype)
