"""A model's training passes, captured without an optimiser, and the loss that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.overrides import _get_current_function_mode

from kfac_laplace import Curvature
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.likelihoods import Likelihood, aligned_target, settled_axis
from kfac_laplace.likelihoods import resolve as likelihood_named
from kfac_laplace.optim.calls import calling
from kfac_laplace.optim.capture import Capture
from kfac_laplace.optim.estimate import Estimate
from kfac_laplace.optim.learning import Lesson, tracked_names


def capture(
    model: nn.Module,
    likelihood: str | Likelihood,
    fisher: str = "mc",
    *,
    kfac_approx: Any = "auto",
    class_axis: int | None = None,
    seed: int = 0,
    output_fn: Any = None,
    largest: int = 4096,
) -> Capture:
    """A capture of every training pass of a model."""
    network = Network.of(model, likelihood_named(likelihood), calling(output_fn))
    return Capture(
        Lesson(network, kfac_approx, class_axis),
        tracked_names(network.model, frozenset(map(id, model.parameters()))),
        Estimate(fisher, largest=largest),
        Generator().manual_seed(seed),
        output_fn,
    )


def calm(model: nn.Module) -> nn.Module:
    """The model in training mode as a whole, with every module inside in evaluation mode."""
    model.eval()
    model.training = True
    return model


def negative_log_likelihood(
    likelihood: str | Likelihood, output: Tensor, y: Tensor, class_axis: int | None = None
) -> Tensor:
    """−log p(y | f) at σ = 1, summed over examples."""
    named = likelihood_named(likelihood)
    axis = settled_axis(named, output, y, class_axis, None)
    f = named.align(output, axis)
    targets = aligned_target(named, y, output.shape, f, axis)
    return -named.log_prob(f, targets, torch.ones((), dtype=f.dtype)).sum()


def run(model: nn.Module, x: Any) -> Any:
    """What the model returns for inputs as a loader yields them."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def factors(blocks: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by group, of blocks with Kronecker factors or of the sums of a capture."""
    found = {}
    for name, block in blocks.items():
        block = block[0] if isinstance(block, tuple) else block
        if block.kind == "kron":
            found[name] = block.factors
    return found


def assert_same_factors(
    got: Mapping[str, tuple[Tensor, Tensor]],
    want: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: float = 1e-10,
) -> None:
    """Factors agree relative to their largest entry, or to 1e-12 of the largest of any group."""
    assert got
    for side in (0, 1):
        most = max(float(want[name][side].abs().max()) for name in got)
        for name in got:
            a, b = got[name][side], want[name][side]
            error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-12 * most)
            assert error < tolerance, f"{name}, {'AB'[side]}: {error:.1e}"


def reference(model: nn.Module, likelihood: str, data: Any, **options: Any) -> Curvature:
    """The curvature of a batch by the library's own pass in evaluation mode."""
    return Curvature(model, likelihood, **options).accumulate(*data)


N = 8


def small(seed: int = 0) -> nn.Module:
    """Two layers in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    """Inputs and labels for it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def wanted(model: nn.Module, data: Any, fisher: str = "exact") -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by the library's own pass."""
    return factors(reference(model, "classification", data, fisher=fisher).blocks)


def assert_nothing_pending(found: Capture) -> None:
    """No tape is running, and nothing waits for a step."""
    assert _get_current_function_mode() is None
    assert found.take() == {}


def backward(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One training pass: the loss of a batch, and its gradients."""
    F.cross_entropy(model(data[0]), data[1]).backward()


def assert_captured(
    found: Capture, want: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0
) -> None:
    """What waits for a step are these factors, of each of the N examples once."""
    sums = found.take(scale)
    assert {n for _, n in sums.values()} == {N}
    assert_same_factors(factors(sums), want)
