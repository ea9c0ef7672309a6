"""A posterior in a line or two, and as a table by group."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.scaling import Scaling

#: What is said of where κ comes from; of older files nothing is known.
ORIGIN = {"given": ", given", "loo": ", by leave-one-out", "validation": ", by held-out data"}


def line(curvature: Curvature, scaling: Scaling, *, fitted: bool) -> str:
    """Likelihood, structure, data and scale, on one line.

    Args:
        curvature: of the posterior.
        scaling: κ and τ.
        fitted: whether `fit` has run.
    """
    options = curvature.options
    parts = [type(curvature.likelihood).__name__, f"{options.hessian_structure}"]
    if not fitted:
        return f"Laplace({', '.join([*parts, 'not fitted'])})"
    parameters = sum(math.prod(shape) for shape in curvature.ggn.knowledge.shapes.values())
    parts += [f"{curvature.n_data} examples", f"{parameters} parameters"]
    parts.append(f"κ = {float(scaling.scale):.4g}{ORIGIN.get(scaling.source, '')}")
    if float(scaling.temperature) != 1:
        parts.append(f"τ = {float(scaling.temperature):.4g}")
    return f"Laplace({', '.join(parts)})"


def table(head: str, posterior: Posterior, coverage: Mapping[str, str]) -> str:
    """Groups with their precisions and directions, then the terms of the evidence.

    Args:
        head: first line.
        posterior: the fitted one.
        coverage: how each parameter is treated.
    """
    prior, ggn = posterior.prior, posterior.ggn
    deltas = prior.by_group(posterior.hyperparameters.prior_precision.detach())
    gammas = _directions(posterior)
    rows = [["group", "parameters", "treatment", "setting", "δ", "γ"]]
    for name, layout in prior.layouts.groups.items():
        treated = "/".join(dict.fromkeys(coverage[param] for param in layout.params))
        setting = ggn.settings.get(name, "–")
        said = setting if isinstance(setting, str) else "/".join(setting)
        numbers = str(layout.size), treated, said, _span(deltas[name]), f"{gammas[name]:.4g}"
        rows.append([name, *numbers])
    return "\n".join([head, "", *aligned(rows), "", *_evidence(posterior)])


def _directions(posterior: Posterior) -> dict[str, float]:
    """γ of each group, whatever shares its precision."""
    with torch.no_grad():
        found = {name: block.effective_dimensions() for name, block in posterior.blocks.items()}
        if "full" in found:
            found = posterior.prior.layouts.pack_vector(found["full"][0, 0])
        return {name: float(gamma.sum()) for name, gamma in found.items()}


def _span(delta: Tensor) -> str:
    """One number, or the least and the largest."""
    low, high = float(delta.min()), float(delta.max())
    return f"{low:.4g}" if low == high else f"{low:.3g} … {high:.3g}"


def _evidence(posterior: Posterior) -> list[str]:
    """Its terms, and what a constant prediction would have."""
    ggn, hyper = posterior.ggn, posterior.hyperparameters
    with torch.no_grad():
        terms = {
            "  log det ratio": posterior.log_det_ratio,
            "  scatter": posterior.scatter,
        }
        if posterior.expansion.knows_fit:
            fit = {
                "log marginal likelihood": posterior.log_marginal_likelihood,
                "  log likelihood": posterior.log_likelihood,
            }
            terms = {**fit, **terms}
    constant = ggn.likelihood.constant_log_likelihood(ggn.targets) / float(hyper.temperature)
    lines = [[name, f"{float(value):.6g}"] for name, value in terms.items()]
    if not math.isnan(constant):
        lines.append(["constant predictor's", f"{constant:.6g}"])
    if ggn.likelihood.has_noise:
        lines.append(["σ", f"{float(hyper.sigma_noise):.4g}"])
    return aligned(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
