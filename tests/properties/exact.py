"""The dense truth about a program: Jacobians by autograd, curvature from plainly written losses."""

from __future__ import annotations

import oracles
import torch
import torch.nn.functional as F
from properties.programs import DEGREES, Program
from torch import Tensor, nn


def loss(program: Program, f: Tensor, y: Tensor) -> Tensor:
    """-log p(y | f) of one position, up to what does not depend on f, in torch's own words."""
    half = program.outputs // 2
    if program.likelihood in ("classification", "reward_modeling"):
        return F.cross_entropy(f, y)
    if program.likelihood == "regression":
        return 0.5 * F.mse_loss(f, y, reduction="sum")
    if program.likelihood == "binary":
        return F.binary_cross_entropy_with_logits(f, y, reduction="sum")
    if program.likelihood == "poisson":
        return F.poisson_nll_loss(f, y, reduction="sum")
    assert program.likelihood == "heteroscedastic"
    mean, variance = f[:half] * (-f[half:]).exp(), (-f[half:]).exp()
    return F.gaussian_nll_loss(mean, y, variance, eps=0.0, reduction="sum")


def curvature(program: Program, f: Tensor, y: Tensor) -> Tensor:
    """Fisher information (c, c) of one position.

    Losses of exponential families in natural parameters have it as their Hessian, whatever y is.
    That of (a, s) has s by its exponential: there it is the mean of the Hessian over y, at the mean
    plus and minus the standard deviation, as the Hessian is quadratic in y.
    """
    if program.likelihood == "studentt":
        return torch.eye(len(f), dtype=f.dtype) * (DEGREES + 1) / (DEGREES + 3)

    def hessian(y: Tensor) -> Tensor:
        return torch.func.hessian(lambda f: loss(program, f, y))(f)

    if program.likelihood == "heteroscedastic":
        mean, deviation = (z * (-0.5 * s).exp() for z, s in _halves(f))
        return (hessian(mean + deviation) + hessian(mean - deviation)) / 2
    return hessian(y)


def _halves(f: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    a, s = f.chunk(2)
    return (a * (-0.5 * s).exp(), s), (torch.ones_like(s), s)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


class Dense:
    """Jacobians (n, k, P) and curvature (n, k, k) of the outputs of all examples.

    Args:
        program: what was drawn.
        model: its network.
        x: inputs.
        y: targets.
    """

    def __init__(self, program: Program, model: nn.Module, x: Tensor, y: Tensor):
        model = model.eval()
        self.names, self.model = trainable(model), model
        output = model(x.clone())
        n, c = len(x), program.outputs
        rows, targets = output.detach().reshape(-1, c), y.reshape(output[..., 0].numel(), -1)
        if program.likelihood in ("classification", "reward_modeling"):
            targets = targets[:, 0]
        each = [curvature(program, f, t) for f, t in zip(rows, targets, strict=True)]
        per = len(each) // n
        self.hessian = torch.stack(
            [torch.block_diag(*each[k * per : (k + 1) * per]) for k in range(n)]
        )
        self.jacobian = oracles.parameter_jacobian(output.flatten(1), model, self.names)
        model.train()

    def ggn(self, params: tuple[str, ...] | None = None) -> Tensor:
        """Σ_n JᵀΛJ of some parameters, of all by default."""
        j = self.jacobian if params is None else self.jacobian[..., self.columns(params)]
        return torch.einsum("nkp,nkl,nlq->pq", j, self.hessian, j)

    def columns(self, params: tuple[str, ...]) -> Tensor:
        """Entries of some parameters among all."""
        sizes = {name: self.model.get_parameter(name).numel() for name in self.names}
        entries = torch.arange(sum(sizes.values())).split([*sizes.values()])
        where = dict(zip(sizes, entries, strict=True))
        return torch.cat([where[name] for name in params])
