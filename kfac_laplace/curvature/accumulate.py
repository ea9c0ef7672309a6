"""One batch more: a GGN, a model and a batch give the GGN of both."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.estimator import Plan, estimate
from kfac_laplace.curvature.estimate.settings import Setting, resolve_settings
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.first_pass import examined
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network, learn_groups
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.batches import AnyBatch, Batch
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.errors import (
    InvalidValue,
    KfacLaplaceError,
    UnsupportedUse,
)
from kfac_laplace.likelihoods import check_finite

log = logging.getLogger("kfac_laplace")


def with_batch(
    ggn: GGN,
    network: Network,
    data: tuple[Any, Tensor],
    generator: Generator,
    parameters: Mapping[str, Tensor] | None = None,
) -> GGN:
    """A GGN and one batch more.

    Args:
        ggn: that of earlier batches, or of none; it stays as it is.
        network: the model.
        data: inputs and targets.
        generator: source of labels and signs.
        parameters: weights by name at which to take the curvature; the model's own by default.
    """
    x, y = data
    with undisturbed(network.model):
        batch = network.batch(x, len(y) if y.ndim else None, ggn.knowledge.interface)
        draws = generator.get_state()
        try:
            return _of_batch(ggn, network, batch, y, generator, parameters).after(ggn)
        except RuntimeError as error:
            # A backward pass of the model's own may mean the order in memory as well.
            if isinstance(error, KfacLaplaceError) or not ggn.knowledge.reorders:
                raise
            generator.set_state(draws)
            ggn = replace(ggn, knowledge=replace(ggn.knowledge, reorders=False))
            return _of_batch(ggn, network, batch, y, generator, parameters).after(ggn)


def _of_batch(
    ggn: GGN,
    network: Network,
    batch: AnyBatch,
    y: Tensor,
    generator: Generator,
    parameters: Mapping[str, Tensor] | None,
) -> GGN:
    """The GGN of one batch, by what is known and what this batch teaches."""
    passed = network.record(batch, ggn.knowledge, parameters)
    passed, f, y = _aligned(passed, y.to(network.device), first=not ggn.n_data)
    passed = passed.knowing(examined(passed))
    statistic = ggn.likelihood.statistic(f, y)
    targets = passed.by_example(y)
    passed = passed.weighted(ggn.likelihood.importance(targets))
    passed = passed.knowing(learn_row_layouts(passed))
    settings = ggn.settings
    if not passed.knowledge.groups:
        passed = passed.knowing(_with_groups(passed, ggn.options))
        settings = _settings(passed, ggn.options)
    idle = _idle_examples(passed.weights)
    # Examples whose labels are all ignored would enter the input factors alone.
    if bool(idle.any()) and not bool(idle.all()) and isinstance(batch, Batch):
        kept = (~idle).nonzero()[:, 0]
        targets = targets[kept]
        passed = network.record(batch.select(kept), passed.knowledge, parameters)
        passed = passed.weighted(ggn.likelihood.importance(targets))
    options = ggn.options
    dtype = SumDtype(options.factor_dtype)
    plan = Plan(options.hessian_structure, settings, options.fisher, dtype)
    blocks, cancelling = estimate(passed, plan, targets, generator)
    if cancelling:
        _warn_of_cancellation(cancelling)
    if bool(idle.all()):
        blocks = {name: block.zero() for name, block in blocks.items()}
    for name, block in blocks.items():
        if not block.is_finite():
            raise InvalidValue(
                "non-finite curvature",
                where=name,
                remedy="Check inputs and weights; half precision may overflow",
            )
    known = replace(passed.knowledge, watched=True)
    return GGN(ggn.options, known, settings, blocks, statistic, batch.n, len(f), f.numel())


def _aligned(passed: ForwardPass, y: Tensor, first: bool) -> tuple[ForwardPass, Tensor, Tensor]:
    """The pass with its class axis known, outputs (rows, t, c) without graph, and targets."""
    output = passed.recording.output
    rows = (output.ndim and output.shape[0], y.ndim and y.shape[0])
    nodes = output.ndim > 0 and passed.output_segments is not None
    if rows[0] != rows[1] or not rows[0] or not (nodes or rows[0] == passed.n):
        raise InvalidValue(
            "inputs, outputs and targets differ in their number of examples",
            where="batch",
            got=f"{passed.n} inputs, output {tuple(output.shape)}, target {tuple(y.shape)}",
            remedy="The first axis must run over the examples",
        )
    axis = passed.likelihood.class_axis(output, y)
    if first:
        passed = passed.knowing(replace(passed.knowledge, class_axis=axis))
    f = passed.output_rows.detach()
    check_finite(f)
    return passed, f, passed.likelihood.align_target(y, f)


def _with_groups(passed: ForwardPass, options: CurvatureOptions) -> Knowledge:
    """The groups of a first pass, the uncovered ones treated as asked for."""
    known = learn_groups(passed, options.subset_of_weights, options.joint_bias)
    uncovered = [group.name for group in known.groups if not group.covered]
    if not uncovered or options.hessian_structure != "kron":
        return known
    if options.uncovered == "error":
        raise UnsupportedUse(
            "no layer rule gives these parameters Kronecker factors",
            where=", ".join(uncovered),
            remedy="Choose uncovered='diag' or 'freeze', or register a rule",
        )
    if not known.listed:
        names = ", ".join(uncovered)
        log.info("without Kronecker factors, treated as '%s': %s", options.uncovered, names)
    if options.uncovered == "freeze":
        known = replace(known, groups=tuple(group for group in known.groups if group.covered))
    return replace(known, listed=True)


def _settings(passed: ForwardPass, options: CurvatureOptions) -> dict[str, Setting]:
    """Expand or reduce for each group with Kronecker factors."""
    layers = [group.name for group in passed.knowledge.groups if group.treatment == "kron"]
    shared = passed.recording.output.ndim > 2 or passed.output_segments is not None
    return resolve_settings(options.kfac_approx, layers, shared)


def _idle_examples(weights: Tensor | None) -> Tensor:
    """Mask (n,) of the examples without an output that counts, shape (1,) where all count."""
    if weights is None:
        return torch.zeros(1, dtype=torch.bool)
    return (weights == 0).flatten(1).all(1)


def _warn_of_cancellation(blind: tuple[str, ...]) -> None:
    """Say where reduce sees no curvature although there is some."""
    log.warning(
        "K-FAC-reduce sees no curvature in %s: an example's gradients cancel over the "
        "shared axis, as those of attention keys do. Give each of them the setting "
        "'expand', as in kfac_approx={'%s': 'expand', '*': 'auto'}",
        ", ".join(blind),
        blind[0],
    )
