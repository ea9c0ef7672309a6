"""A posterior in a line or two, and as a table by group."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.estimate.leading_block import LeadingBlock
from kfac_laplace.curvature.estimate.low_rank import LowRankBlock
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.model.unchanged import parameters_of
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.predict.scaling import Scaling

#: What is said of where κ comes from; of older files nothing is known.
ORIGIN = {"given": ", given", "loo": ", by leave-one-out", "validation": ", by held-out data"}
#: Where the gradients of a group come from.
GRADIENTS = {"exact": "layer rule", "generic": "copies by example"}
HEADINGS = ("group", "parameters", "treatment", "gradients", "setting", "memory", "δ", "γ")
#: Most groups that notebooks show; `summary` has all.
SHOWN = 20


@dataclass(frozen=True)
class Line:
    """What there is to say of a group of parameters, or of a parameter outside the posterior.

    Args:
        name: of the group, or of the parameter.
        parameters: number of entries.
        treatment: "kron", "ekfac", "diag", "dense", "lowrank", "unused" or "frozen".
        gradients: where its gradients come from: "layer rule", or without one "copies by example".
        setting: "expand" or "reduce" of Kronecker blocks, one for each part.
        delta: least and largest prior precision; None outside the posterior.
        gamma: number of directions that the data determine.
        memory: bytes of its factors; those of one block of all are shared by parameters.
    """

    name: str
    parameters: int
    treatment: str
    gradients: str = ""
    setting: str = ""
    delta: tuple[float, float] | None = None
    gamma: float = 0.0
    memory: int = 0

    @property
    def cells(self) -> list[str]:
        """As a row of the table."""
        numbers = ["–", "–", "–"]
        if self.delta is not None:
            numbers = [_size(self.memory), _span(self.delta), f"{self.gamma:.4g}"]
        words = [self.treatment, self.gradients or "–", self.setting or "–"]
        return [self.name, str(self.parameters), *words, *numbers]


def line(curvature: Curvature, scaling: Scaling, *, fitted: bool) -> str:
    """Likelihood, structure, data and scale, on one line.

    Args:
        curvature: of the posterior.
        scaling: κ and τ of its predictions.
        fitted: whether `fit` has run.
    """
    options = curvature.options
    parts = [type(curvature.likelihood).__name__, options.structure]
    if not fitted:
        return f"Laplace({', '.join([*parts, 'not fitted'])})"
    parameters = sum(each.count for each in curvature.ggn.knowledge.entries.values())
    parts += [f"{curvature.n_data} examples", f"{parameters} parameters"]
    parts.append(f"κ = {float(scaling.scale):.4g}{ORIGIN.get(scaling.source, '')}")
    if float(scaling.temperature) != 1:
        parts.append(f"τ = {float(scaling.temperature):.4g}")
    return f"Laplace({', '.join(parts)})"


def lines(posterior: Posterior, coverage: Mapping[str, str]) -> tuple[Line, ...]:
    """The groups in the order of their blocks, then the parameters outside the posterior.

    Args:
        posterior: the fitted one.
        coverage: how each parameter is treated.
    """
    deltas = posterior.prior.by_group(posterior.hyperparameters.prior_precision.detach())
    gammas = _directions(posterior)
    made = [
        _of_group(posterior, group, coverage, deltas[group.name], gammas[group.name])
        for group in posterior.ggn.groups
    ]
    live = parameters_of(posterior.network.model)
    outside = [name for name, treated in coverage.items() if treated == "frozen"]
    return (*made, *(Line(name, live[name].numel(), "frozen") for name in outside))


def _of_group(
    posterior: Posterior, group: Group, coverage: Mapping[str, str], delta: Tensor, gamma: float
) -> Line:
    """One group."""
    layout, ggn = group.block_layout, posterior.ggn
    setting = ggn.settings.get(group.name, "")
    return Line(
        group.name,
        layout.size,
        "/".join(dict.fromkeys(coverage[param] for param in layout.params)),
        GRADIENTS.get(group.role, "layer rule"),
        setting if isinstance(setting, str) else "/".join(setting),
        (float(delta.min()), float(delta.max())),
        gamma,
        _bytes_of_group(posterior, group),
    )


def _bytes_of_group(posterior: Posterior, group: Group) -> int:
    """Of its block; of one of all parameters its own columns, all rows."""
    blocks, whole = posterior.ggn.blocks, posterior.ggn.options.one_block
    if whole is not None:
        rows = blocks[whole].factors
        return group.block_layout.size * len(rows) * rows.element_size()
    return sum(one.numel() * one.element_size() for one in blocks[group.name].tensors().values())


def table(head: str, posterior: Posterior, groups: Sequence[Line]) -> str:
    """Groups with their precisions and directions, then the terms of the evidence.

    Args:
        head: first line.
        posterior: the fitted one.
        groups: as `lines` has them.
    """
    rows = [list(HEADINGS), *(group.cells for group in groups), _total(groups)]
    return "\n".join([head, "", *aligned(rows), "", *aligned(_evidence(posterior))])


def markup(head: str, posterior: Posterior | None, groups: Sequence[Line]) -> str:
    """The same as HTML for notebooks, at most `SHOWN` groups; before a fit the first line alone."""
    title = f"<strong>{html.escape(head)}</strong>"
    if posterior is None:
        return f"<div>{title}</div>"
    rows = [group.cells for group in groups[:SHOWN]]
    if len(groups) > SHOWN:
        rows.append([f"… {len(groups) - SHOWN} more", *[""] * (len(HEADINGS) - 1)])
    by_group = rows_of_html([*rows, _total(groups)], HEADINGS)
    evidence = rows_of_html(_evidence(posterior))
    return (
        f"<div>{title}<details><summary>{len(groups)} groups</summary>{by_group}</details>"
        f"{evidence}</div>"
    )


def rows_of_html(rows: Sequence[Sequence[str]], headings: Sequence[str] = ()) -> str:
    """A table whose first column names the rows; everything is escaped."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in headings)
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"
    )


def _total(groups: Sequence[Line]) -> list[str]:
    """The last row: sums over the posterior."""
    inside = [group for group in groups if group.delta is not None]
    count = sum(group.parameters for group in inside)
    gamma = f"{sum(group.gamma for group in inside):.4g}"
    memory = _size(sum(group.memory for group in inside))
    return ["in the posterior", str(count), "", "", "", memory, "", gamma]


def _directions(posterior: Posterior) -> dict[str, float]:
    """γ of each group, whatever shares its precision."""
    with torch.no_grad():
        gammas = posterior.effective_dimensions_by_group()
        names = posterior.prior.layouts.groups
        return {name: float(gamma) for name, gamma in zip(names, gammas, strict=True)}


def _span(delta: tuple[float, float]) -> str:
    """One number, or the least and the largest."""
    low, high = delta
    return f"{low:.4g}" if low == high else f"{low:.3g} … {high:.3g}"


def _size(count: int) -> str:
    """Bytes in words."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _evidence(posterior: Posterior) -> list[list[str]]:
    """Its terms, and what a constant prediction would have."""
    hyper = posterior.hyperparameters
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
    rows = [[name, f"{float(value):.6g}"] for name, value in terms.items()]
    if not math.isnan(posterior.constant_evidence):
        rows.append(["constant predictor's", f"{posterior.constant_evidence:.6g}"])
    if (share := _share_held(posterior.ggn.blocks.values())) is not None:
        rows.append(["share of the trace held", f"{share:.4g}"])
    if posterior.ggn.likelihood.has_noise:
        rows.append(["σ", f"{float(hyper.sigma_noise):.4g}"])
    if float(hyper.temperature) != 1:
        rows.append(["T", f"{float(hyper.temperature):.4g}"])
    return rows


def _share_held(blocks: Iterable[Block]) -> float | None:
    """Share of the trace that leading directions hold; None where no block is such."""
    kept = [block.held for block in blocks if isinstance(block, LowRankBlock | LeadingBlock)]
    held, whole = (sum(each) for each in zip(*kept, strict=True)) if kept else (0.0, 0.0)
    return held / whole if whole > 0 else None


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
