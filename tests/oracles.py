"""Dense oracles written with autograd alone, slow and plain: the yardstick of the test-suite.

Index letters: n example, t shared position, s loss term, c class or output, k = (s, c) flattened,
g group, o/i weight rows/columns, p parameter. Everything is a sum over examples at sigma = 1.
`x, y` are one whole data set; `likelihood` is "classification", "regression" or "binary".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trainable(model: nn.Module) -> list[str]:
    """Names of the trainable parameters, in registration order."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def terms(output: Tensor, target: Tensor, likelihood: str) -> Tensor:
    """The output as (n, s, c): loss terms by classes; s = 1 unless the likelihood is softmax."""
    if likelihood != "classification":
        return output.reshape(len(output), 1, -1)
    if output.shape[:-1] != target.shape:
        output = output.movedim(1, -1)  # dense outputs in torch's own convention (n, c, ...)
    return output.reshape(len(output), -1, output.shape[-1])


def flat_outputs(model: nn.Module, x: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """f as (n, k), with its graph."""
    return terms(model(x), y, likelihood).flatten(1)


def output_hessian(output: Tensor, target: Tensor, likelihood: str) -> Tensor:
    """Lambda (n, k, k) at sigma = 1: diag(p) - p p^T per loss term, identity, or p (1 - p)."""
    f = terms(output.detach(), target, likelihood)
    n, s, c = f.shape
    if likelihood == "regression":
        return torch.eye(s * c, dtype=f.dtype).expand(n, -1, -1)
    if likelihood == "binary":
        p = f.sigmoid().flatten(1)
        return torch.diag_embed(p * (1 - p))
    p = f.softmax(-1)
    per_term = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)  # (n, s, c, c)
    dense = torch.zeros(n, s, c, s, c, dtype=f.dtype)
    for j in range(s):
        dense[:, j, :, j, :] = per_term[:, j]
    return dense.reshape(n, s * c, s * c)


def negative_log_likelihoods(
    output: Tensor, target: Tensor, likelihood: str, sigma: Tensor | float = 1.0
) -> Tensor:
    """-log p(y_n | f_n) (n,), summed over positions and outputs, normaliser included."""
    f = terms(output, target, likelihood)
    if likelihood == "classification":
        log_p = f.log_softmax(-1).gather(-1, target.reshape(len(f), -1, 1))
        return -log_p.flatten(1).sum(1)
    y = target.reshape(f.shape).to(f.dtype)
    if likelihood == "binary":
        nll = F.binary_cross_entropy_with_logits(f, y, reduction="none")
        return nll.flatten(1).sum(1)
    sigma = torch.as_tensor(sigma, dtype=f.dtype)
    nll = 0.5 * ((y - f) / sigma) ** 2 + sigma.log() + 0.5 * math.log(2 * math.pi)
    return nll.flatten(1).sum(1)


def parameter_jacobian(rows: Tensor, model: nn.Module, names: list[str]) -> Tensor:
    """d rows / d parameters: (..., p), one backward pass per entry; unused parameters are zero."""
    named = dict(model.named_parameters())
    params = [named[name] for name in names]
    gradients = []
    for row in rows.flatten():
        got = torch.autograd.grad(row, params, retain_graph=True, allow_unused=True)
        pairs = zip(got, params, strict=True)
        gradients.append(torch.cat([_or_zero(g, p).flatten() for g, p in pairs]))
    return torch.stack(gradients).reshape(*rows.shape, -1)


def jacobian(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: str, names: list[str] | None = None
) -> Tensor:
    """J (n, k, p) of the flattened outputs, parameters flattened one after another."""
    names = trainable(model) if names is None else list(names)
    return parameter_jacobian(flat_outputs(model, x, y, likelihood), model, names)


def ggn(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: str, names: list[str] | None = None
) -> Tensor:
    """The exact GGN (p, p) of the named parameters: sum over examples of J^T Lambda J."""
    j = jacobian(model, x, y, likelihood, names)
    hessian = output_hessian(model(x), y, likelihood)
    return torch.einsum("nkp,nkl,nlq->pq", j, hessian, j)


def empirical_fisher(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: str, names: list[str] | None = None
) -> Tensor:
    """Sum over examples of score outer products (p, p), sigma = 1."""
    names = trainable(model) if names is None else list(names)
    nll = negative_log_likelihoods(model(x), y, likelihood)
    scores = parameter_jacobian(nll, model, names)  # (n, p)
    return scores.T @ scores


class Factors(NamedTuple):
    """K-FAC factors per group: input (g, i, i) normalised, output (g, o, o) a raw sum."""

    input: Tensor
    output: Tensor


def layer_tensors(
    model: nn.Module, layer: str, x: Tensor, y: Tensor, likelihood: str
) -> tuple[Tensor, Tensor]:
    """Inputs a (n, t, g, i) and output gradients b (n, t, g, o, k) of a linear or conv module.

    Several uses of the module are concatenated along t. Dimension 0 of its input is the example.
    """
    module = model.get_submodule(layer)
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0].detach().clone())
        outputs.append(output)
        return output.clone()  # what follows may work in place on the clone

    handle = module.register_forward_hook(keep)
    try:
        f = flat_outputs(model, x, y, likelihood)  # (n, k)
    finally:
        handle.remove()
    columns = []
    for column in f.sum(0):  # examples do not mix, so the sum over n separates them
        got = torch.autograd.grad(column, outputs, retain_graph=True, allow_unused=True)
        pairs = zip(got, outputs, strict=True)
        columns.append(torch.cat([_positions(_or_zero(g, s), module) for g, s in pairs], 1))
    groups = getattr(module, "groups", 1)
    b = torch.stack(columns, -1).unflatten(2, (groups, -1))  # (n, t, g, o, k)
    a = torch.cat([_patches(z, module) for z in inputs], 1)  # (n, t, g * i)
    return a.unflatten(2, (groups, -1)), b


def kfac_factors(
    model: nn.Module,
    layer: str,
    data: tuple[Tensor, Tensor, str],
    setting: str,
    *,
    joint_bias: bool = True,
    hessian: Tensor | None = None,
    live: Tensor | None = None,
) -> Factors:
    """K-FAC-expand or K-FAC-reduce of one module by the formulas, `data` = (x, y, likelihood).

    `joint_bias` appends the constant input 1 to a (only where the bias is trainable).
    `hessian` (n, k, k) replaces Lambda, e.g. by score outer products.
    `live` (n, t) says which positions count: no output depends on the others.
    """
    x, y, likelihood = data
    module = model.get_submodule(layer)
    a, b = layer_tensors(model, layer, x, y, likelihood)
    if hessian is None:
        hessian = output_hessian(model(x), y, likelihood)
    if joint_bias and module.bias is not None and module.bias.requires_grad:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    live = torch.ones(a.shape[:2], dtype=torch.bool) if live is None else live
    count = live.sum()
    a = a * live[:, :, None, None]
    if setting == "reduce":
        a = a.sum(1, keepdim=True) / live.sum(1).clamp_min(1)[:, None, None, None]
        b, count = b.sum(1, keepdim=True), live.any(1).sum()
    return Factors(
        torch.einsum("ntgi,ntgj->gij", a, a) / count,
        torch.einsum("ntgok,nkl,ntgpl->gop", b, hessian, b),
    )


def kfac_block(factors: Factors, *, bias_column: bool = False) -> Tensor:
    """Dense B (x) A (p, p): the weight flattened, then (with `bias_column`) the bias."""
    products = torch.einsum("gop,gij->goipj", factors.output, factors.input)
    dense = torch.block_diag(*[z.flatten(2, 3).flatten(0, 1) for z in products])
    if not bias_column:
        return dense
    rows = factors.output.shape[0] * factors.output.shape[1]
    index = torch.arange(len(dense)).reshape(rows, -1)  # (g o, i + 1)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return dense[order][:, order]


def log_det_ratio(hessian: Tensor, scale: Tensor | float, delta: Tensor) -> Tensor:
    """log det(scale H + diag(delta)) - log det diag(delta), by slogdet."""
    precision = scale * hessian + torch.diag(delta)
    return torch.linalg.slogdet(precision).logabsdet - delta.log().sum()


def evidence(
    log_likelihood: Tensor, hessian: Tensor, theta: Tensor, delta: Tensor, **scales: Tensor | float
) -> Tensor:
    """Log evidence; `hessian` at sigma = 1, `scales` may hold sigma, temperature, prior_mean.

    `log_likelihood` is the normalised sum at the given sigma; `delta` (p,) and `theta` (p,).
    """
    sigma, temperature = scales.get("sigma", 1.0), scales.get("temperature", 1.0)
    ratio = log_det_ratio(hessian, 1 / (sigma**2 * temperature), delta)
    scatter = (delta * (theta - scales.get("prior_mean", 0.0)) ** 2).sum()
    return log_likelihood / temperature - 0.5 * (ratio + scatter)


def glm_covariance(j: Tensor, hessian: Tensor, scale: Tensor | float, delta: Tensor) -> Tensor:
    """J (scale H + diag(delta))^-1 J^T per example: j (n, k, p) -> (n, k, k)."""
    precision = scale * hessian + torch.diag(delta)
    return j @ torch.linalg.solve(precision, j.mT)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _positions(s: Tensor, module: nn.Module) -> Tensor:
    """A layer output or its gradient as (n, t, o)."""
    if not isinstance(module, nn.Linear):
        s = s.movedim(1, -1)
    return s.reshape(len(s), -1, s.shape[-1])


def _patches(x: Tensor, module: nn.Module) -> Tensor:
    """A layer input as (n, t, i): rows of a linear layer, patches (channel first) of a conv."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    dims = len(module.kernel_size)
    if not module.padding == "valid":
        mode = {"zeros": "constant"}.get(module.padding_mode, module.padding_mode)
        x = F.pad(x, _padding(module), mode=mode)
    for d, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + d, gap * (size - 1) + 1, step)[..., ::gap]
    # (n, c, *outputs, *kernel) -> (n, *outputs, c, *kernel)
    x = x.movedim(1, 1 + dims)
    return x.flatten(1 + dims).flatten(1, dims)


def _padding(module: nn.Module) -> list[int]:
    """F.pad's argument: last axis first, (before, after) for each."""
    pads: list[int] = []
    for d in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[d] * (module.kernel_size[d] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [module.padding[d]] * 2
    return pads
