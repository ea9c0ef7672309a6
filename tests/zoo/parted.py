"""What a network of the zoo gives when ranks fit it: importable, as new processes import it."""

from __future__ import annotations

import logging

import torch.distributed as dist
import zoo.fitting  # noqa: F401 (it registers the networks)
from torch import Tensor
from zoo.case import ZooCase, build

from kfac_laplace import Laplace

#: Batches by number of ranks: uneven parts, and a rank without data.
PARTS = {2: ((0,), (1, 2)), 3: ((0, 1), (2,), ())}


def found(case: ZooCase, la: Laplace) -> dict[str, Tensor]:
    """Curvature, evidence, its optimum and predictions of a fitted posterior."""
    curvature = la.curvature
    answers = {f"block {name}": block.dense() for name, block in curvature.blocks.items()}
    answers["evidence"] = la.log_marginal_likelihood().detach()
    la.optimize_prior("mackay", n_steps=5)
    answers["precisions"] = la.prior_precision
    answers["evidence, optimised"] = la.log_marginal_likelihood().detach()
    la.prior_precision = la.prior_precision.clamp(0.1, 10.0)
    answers["predictions"] = la.predict(case.data[0], link_approx="probit").mean
    return answers


def on_rank(names: tuple[str, ...]) -> dict[str, dict[str, Tensor] | str]:
    """Each network fitted by all ranks."""
    logging.getLogger("kfac_laplace").setLevel(logging.ERROR)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    answers: dict[str, dict[str, Tensor] | str] = {}
    for name in names:
        case = build(name)
        batches = case.batches()
        la = Laplace(case.model, case.likelihood, process_group="world", **case.options)
        la.fit([batches[k] for k in PARTS[ranks][rank]])
        answers[name] = found(case, la)
    return answers
