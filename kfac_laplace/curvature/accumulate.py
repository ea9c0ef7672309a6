"""One batch more: a GGN, a model and a batch give the GGN of both."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.choice import choose_settings, first_examples, idle_examples
from kfac_laplace.curvature.estimate.estimator import Estimand, estimate
from kfac_laplace.curvature.estimate.finite import not_finite
from kfac_laplace.curvature.estimate.structures import is_factored
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.effect import effective
from kfac_laplace.curvature.gradients.first_pass import examined
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network, learn_groups
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.linalg.dtypes import SumDtype
from kfac_laplace.curvature.model.batches import Batch
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.curvature.options import CurvatureOptions
from kfac_laplace.devices import sent
from kfac_laplace.errors import (
    InvalidValue,
    KfacLaplaceError,
    UnsupportedUse,
)
from kfac_laplace.likelihoods import aligned_target, check_finite, settled_axis

log = logging.getLogger("kfac_laplace")

#: takes what is estimated to what is estimated instead
Amend = Callable[[Estimand], Estimand]


def with_batch(
    ggn: GGN,
    network: Network,
    data: tuple[Any, Tensor],
    generator: Generator,
    parameters: Mapping[str, Tensor] | None = None,
    amend: Amend | None = None,
) -> GGN:
    """A GGN and one batch more.

    Args:
        ggn: that of earlier batches, or of none; it stays as it is.
        network: the model.
        data: inputs and targets.
        generator: source of labels and signs.
        parameters: weights by name at which to take the curvature; the model's own by default.
        amend: changes what is estimated, for who watches.
    """
    x, y = data
    with undisturbed(network.model):
        batch = network.batch(x, len(y) if y.ndim else None, ggn.knowledge.interface)
        draws = generator.get_state()
        # Popped, so that a pass which is made again lies in memory once.
        passes = [network.record(batch, ggn.knowledge, parameters)]
        reordered = passes[0].reordered
        try:
            return _of_pass(ggn, network, passes.pop(), y, generator, parameters, amend).after(ggn)
        except RuntimeError as error:
            # A backward pass of the model's own may mean the order in memory as well.
            if not reordered or isinstance(error, KfacLaplaceError) or ran_out_of_memory(error):
                raise
        generator.set_state(draws)
        ggn = replace(ggn, knowledge=replace(ggn.knowledge, reorders=False))
        passes = [network.record(batch, ggn.knowledge, parameters)]
        return _of_pass(ggn, network, passes.pop(), y, generator, parameters, amend).after(ggn)


def _of_pass(
    ggn: GGN,
    network: Network,
    passed: ForwardPass,
    y: Tensor,
    generator: Generator,
    parameters: Mapping[str, Tensor] | None,
    amend: Amend | None,
) -> GGN:
    """The GGN of one batch, by what is known and what this batch teaches."""
    batch = passed.batch
    passed, f, y = _aligned(passed, sent(y, network.device), ggn.options.class_axis)
    passed = passed.knowing(examined(passed))
    statistic, sums = ggn.likelihood.statistic(f, y), ggn.likelihood.target_sums(y, f)
    targets = passed.by_example(y)
    passed = passed.weighted(ggn.likelihood.importance(targets))
    passed = passed.knowing(learn_row_layouts(passed))
    settings, first = ggn.settings, not passed.knowledge.groups
    if first:
        passed = passed.knowing(_with_groups(passed, ggn.options))
        few = partial(first_examples, network, passed, parameters)
        blind = few if is_factored(ggn.options.hessian_structure) else None
        layers = [g.name for g in passed.knowledge.groups if g.treatment == "kron"]
        if [*settings] != layers:
            settings = choose_settings(passed, ggn.options.kfac_approx, blind)
    passed = passed.knowing(_with_effects(passed, ggn.options, first))
    idle = idle_examples(passed.weights)
    # Examples whose labels are all ignored would enter the input factors alone.
    if bool(idle.any()) and not bool(idle.all()) and isinstance(batch, Batch):
        kept = (~idle).nonzero()[:, 0]
        targets = targets[kept]
        passed = network.record(batch.select(kept), passed.knowledge, parameters)
        passed = passed.weighted(ggn.likelihood.importance(targets))
    options = ggn.options
    dtype = SumDtype(options.factor_dtype)
    estimand = Estimand(
        options.hessian_structure,
        settings,
        options.fisher,
        dtype,
        bases=ggn.bases,
        home=options.home(network.device),
    )
    estimand = estimand if amend is None else amend(estimand)
    blocks = estimate(passed, estimand, targets, generator)
    if bool(idle.all()):
        blocks = {name: block.zero() for name, block in blocks.items()}
    if (name := not_finite(blocks)) is not None:
        raise InvalidValue(
            "non-finite curvature",
            where=name,
            remedy="Check inputs and weights; half precision may overflow",
        )
    known = passed.learned
    counts = {"n_data": batch.n, "n_rows": len(f), "n_outputs": f.numel()}
    return GGN(options, known, settings, blocks, statistic, **counts, targets=sums, bases=ggn.bases)


def _aligned(
    passed: ForwardPass, y: Tensor, given: int | None
) -> tuple[ForwardPass, Tensor, Tensor]:
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
    axis = settled_axis(passed.likelihood, output, y, given, passed.knowledge.axis)
    passed = passed.knowing(passed.knowledge.with_axis(axis, output.ndim))
    f = passed.output_rows.detach()
    check_finite(f)
    return passed, f, aligned_target(passed.likelihood, y, output.shape, f, axis)


def _with_groups(passed: ForwardPass, options: CurvatureOptions) -> Knowledge:
    """The groups of a first pass, without the uncovered ones where these are to be frozen."""
    known = learn_groups(passed, options.subset_of_weights, options.joint_bias)
    if options.uncovered_stay_out:
        return replace(known, groups=tuple(group for group in known.groups if group.covered))
    return known


def _with_effects(passed: ForwardPass, options: CurvatureOptions, first: bool) -> Knowledge:
    """What this pass shows to have an effect; uncovered parameters treated as asked for.

    A parameter that an earlier batch did not use has no rule, whatever its use is now.
    """
    known = passed.knowledge
    found = effective(passed.recording).intersection(known.tracked) - known.effective
    without_rule = [name for name in known.tracked if name in found - _covered(known)]
    known = replace(known, effective=known.effective | found)
    if not without_rule or not is_factored(options.hessian_structure):
        return known
    late = [] if first else [name for name in without_rule if name in _factorable(passed)]
    if late and options.uncovered != "error":
        return _telling_late(known, late, options.uncovered)
    if options.uncovered == "error":
        raise UnsupportedUse(
            "no layer rule gives these parameters Kronecker factors",
            where=", ".join(without_rule),
            got="used first in a later batch" if late else None,
            remedy="Begin with a batch that uses them, or choose uncovered='diag' or 'freeze'"
            if late
            else "Choose uncovered='diag' or 'freeze', or register a rule",
        )
    if not known.listed:
        names = ", ".join(without_rule)
        log.info("without Kronecker factors, treated as '%s': %s", options.uncovered, names)
    return replace(known, listed=True)


def _factorable(passed: ForwardPass) -> frozenset[str]:
    """Names of the parameters that a pass uses in layers with Kronecker factors alone."""
    uses = passed.recording.uses
    other = [use.params for use in uses if not use.layer.kronecker]
    own = [use.params for use in uses if use.layer.kronecker]
    return frozenset[str]().union(*own) - passed.recording.loose.union(*other)


def _telling_late(known: Knowledge, late: list[str], treated: str) -> Knowledge:
    """Say, once of each, what a batch used too late to have Kronecker factors."""
    names = [name for name in late if name not in known.late]
    if names:
        log.warning(
            "used first in a later batch, and so %s: %s. Begin with a batch that uses them for "
            "Kronecker factors, on which evidence and predictions depend",
            "left at their values" if treated == "freeze" else "treated by an exact diagonal",
            ", ".join(names),
        )
    return replace(known, late=known.late.union(names))


def _covered(known: Knowledge) -> frozenset[str]:
    """Names of the parameters whose uses layer rules cover."""
    covered = (group.layout.params for group in known.groups if group.covered)
    return frozenset[str]().union(*covered)
