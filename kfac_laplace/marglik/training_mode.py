"""What a network computes in training mode, of which curvature in evaluation mode knows nothing.

Batch norm in training mode divides by the spread of the batch: the outputs of an example depend on
the others, and the scale of the weights before it changes no output. The evidence, of evaluation
mode, sees neither.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.failures import ran_out_of_memory
from kfac_laplace.curvature.model.forward import substituted
from kfac_laplace.curvature.model.kept import without_trace
from kfac_laplace.curvature.model.random_states import random_states_kept
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.devices import CPU, seed_draws

log = logging.getLogger("kfac_laplace")

#: Doubling a weight changes outputs by less than this share of what zeroing it changes, where its
#: scale does not matter: norms add a small number to the spread, so that some is left.
SHARE = 1e-2
#: Outputs within this of each other, beside their size, are the same up to rounding.
SAME = 1e-3

Modes = Mapping[nn.Module, bool]
Found = TypeVar("Found")


@dataclass(frozen=True)
class TrainingMode:
    """What is special about the outputs of training mode.

    Args:
        batch_statistics: whether the outputs of an example depend on the others in its batch.
        scale_free: names of groups whose scale changes no output.
        modes: of the modules, in the model's order, when it was looked at.
    """

    batch_statistics: bool = False
    scale_free: frozenset[str] = frozenset()
    modes: tuple[bool, ...] = ()

    @classmethod
    def of(
        cls, network: Network, groups: Iterable[Group], batch: AnyBatch, modes: Modes
    ) -> "TrainingMode":
        """Found by running the model on a few examples; it is left as it was.

        Args:
            network: the model.
            groups: those that might be scale-free.
            batch: a few examples.
            modes: modes of its modules while it was trained.
        """
        typed = any(mode and isinstance(module, _BatchNorm) for module, mode in modes.items())
        mixes = _on_few(network, partial(_Runs(network, modes).mixes_examples, batch))
        scale_free = None
        for tried in (modes, dict.fromkeys(modes, False)):  # where training fails on a few
            scale_free = _on_few(network, partial(_Runs(network, tried).scale_free, groups, batch))
            if scale_free is not None:
                break
        mixed = typed if mixes is None else mixes
        return cls(mixed, scale_free or frozenset(), tuple(modes.values()))


def _on_few(network: Network, run: Callable[[], Found]) -> Found | None:
    """What runs of a model on a few examples find; None where it fails on them."""
    try:
        with (
            without_trace(network.model),
            undisturbed(network.model),
            random_states_kept(network.device),
            torch.no_grad(),
        ):
            return run()
    except Exception as error:  # models raise what they like on a few examples
        if ran_out_of_memory(error):
            raise
        log.debug("the model fails on a few examples: %r", error)
        return None


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Whether each module is in training mode."""
    return {module: module.training for module in model.modules()}


class _Runs:
    """Runs of a model in its modes of training, with the same random numbers each.

    Args:
        network: the model.
        modes: the modes.
    """

    def __init__(self, network: Network, modes: Modes):
        self._network, self._modes = network, modes

    def _output(self, batch: AnyBatch, params: Mapping[str, Tensor]) -> Tensor:
        with substituted(self._network.model, params):
            for module, training in self._modes.items():
                module.training = training
            for device in {CPU, self._network.device}:
                seed_draws(device, 0)
            return self._network.forward(batch.copied().x).double()

    def mixes_examples(self, batch: AnyBatch) -> bool | None:
        """Whether an example's outputs depend on the others; None where that cannot be seen."""
        if batch.segments or batch.n < 3:
            return None
        own = max(1, batch.n // 4)
        company = torch.arange(own, batch.n - batch.n % own, device="cpu").split(own)
        batches = [
            batch.select(torch.cat([torch.arange(own, device="cpu"), others])) for others in company
        ]
        outputs = [self._output(some, {}) for some in (batches[0], *batches)]
        if outputs[0].ndim < 1 or len(outputs[0]) != 2 * own:
            return None
        first, *others = (output[:own] for output in outputs)
        if not torch.equal(first, others[0]):  # random numbers of its own
            return None
        if any((first - other).norm() > SAME * first.norm() for other in others[1:]):
            return True
        alike = all(torch.equal(outputs[1][own:], output[own:]) for output in outputs[2:])
        return None if alike else False

    def scale_free(self, groups: Iterable[Group], batch: AnyBatch) -> frozenset[str]:
        """Names of the groups whose scale changes no output."""
        return frozenset(group.name for group in groups if self.is_scale_free(group, batch))

    def is_scale_free(self, group: Group, batch: AnyBatch) -> bool:
        """Whether a weight (with its bias) may be doubled, and not left out, without effect."""
        own = self._network.parameters(group.layout.params)
        as_it_is = self._output(batch, {})
        gone = (self._output(batch, {n: 0 * p for n, p in own.items()}) - as_it_is).norm()
        if gone <= SAME * as_it_is.norm():  # no effect at all
            return False
        doubled = self._output(batch, {n: 2 * p for n, p in own.items()}) - as_it_is
        return bool(doubled.norm() <= SHARE * gone)
