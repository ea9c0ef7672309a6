"""Expand or reduce, by layer: what the caller chose, and what "auto" is on a first batch."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.cancellation import EXAMPLES, shares, sharing_groups
from kfac_laplace.curvature.estimate.settings import KfacApprox, Setting, chosen_settings
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.batches import Batch
from kfac_laplace.curvature.model.kept import without_trace

log = logging.getLogger("kfac_laplace")


def choose_settings(
    passed: ForwardPass, kfac_approx: KfacApprox, few: Callable[[], ForwardPass] | None
) -> dict[str, Setting]:
    """Expand or reduce for each group with Kronecker factors.

    "auto" is expand where the loss keeps the shared axis (token or pixel outputs), and reduce where
    the model returns one output row for each example; but not for layers that it would blind.

    Args:
        passed: a pass whose groups are known.
        kfac_approx: what the caller chose.
        few: a pass over a few examples, on which gradients that cancel are looked for; None where
            nothing is asked of Kronecker factors.
    """
    layers = [group.name for group in passed.knowledge.groups if group.treatment == "kron"]
    chosen = chosen_settings(kfac_approx, layers)
    shared = passed.recording.output.ndim > 2 or passed.output_segments is not None
    settings: dict[str, Setting] = {
        name: "expand" if setting == "expand" or (setting == "auto" and shared) else "reduce"
        for name, setting in chosen.items()
    }
    reduced = [group for group in sharing_groups(passed) if settings[group.name] == "reduce"]
    if not reduced or few is None:
        return settings
    with without_trace(passed.forward.model):
        kept, blind = shares(few(), reduced), []
    for group in reduced:
        if chosen[group.name] == "auto":
            settings[group.name] = kept[group.name].setting(group.layout.parts)
        elif bool(kept[group.name].cancel.any()):
            blind.append(group.name)
    if blind:
        _warn_of_cancellation(blind)
    return settings


def first_examples(
    network: Network, passed: ForwardPass, parameters: Mapping[str, Tensor] | None
) -> ForwardPass:
    """A pass over the first examples that count; that of the batch where these are all.

    Args:
        network: the model.
        passed: a pass over the batch.
        parameters: weights by name at which it was made; the model's own by default.
    """
    weights = passed.weights
    chosen = (~idle_examples(weights)).nonzero()[:, 0]
    chosen = torch.arange(passed.n, device="cpu") if len(chosen) <= 1 else chosen
    if len(chosen[:EXAMPLES]) == passed.n or not isinstance(passed.batch, Batch):
        return passed
    chosen = chosen[:EXAMPLES].cpu()
    few = network.record(passed.batch.select(chosen), passed.knowledge, parameters)
    if weights is not None and len(weights) > 1:
        weights = weights[chosen.to(weights.device)]
    return few.weighted(weights)


def idle_examples(weights: Tensor | None) -> Tensor:
    """Mask (n,) of the examples without an output that counts, shape (1,) where all count."""
    if weights is None:
        return torch.zeros(1, dtype=torch.bool, device="cpu")
    return (weights == 0).flatten(1).all(1)


def _warn_of_cancellation(blind: list[str]) -> None:
    """Say where reduce sees next to no curvature although there is some."""
    log.warning(
        "K-FAC-reduce sees less than a quarter of the curvature in %s: an example's gradients "
        "cancel over the shared axis, as those of attention keys do. Give each of them the setting "
        "'expand', as in kfac_approx={'%s': 'expand', '*': 'reduce'}, or leave it to 'auto'",
        ", ".join(blind),
        blind[0],
    )
