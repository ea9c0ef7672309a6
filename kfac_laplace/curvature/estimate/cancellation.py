"""What reduce loses: gradients of an example that cancel where its rows are put together.

The gradients of attention keys do, and those of a module that compares two things, as in
f(a) − f(b). The trace of each layer's block says so, beside the exact one, on a few examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.blocks import DiagonalBlock, KroneckerBlock
from kfac_laplace.curvature.estimate.estimator import Plan, estimate
from kfac_laplace.curvature.estimate.settings import PartSetting
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.likelihoods import Likelihood

#: Examples looked at, and vectors of signs. Traces are sums: a factor of two shows in a handful.
EXAMPLES = 8
VECTORS = 2


@dataclass(frozen=True)
class Signs:
    """Vectors of random signs: Λ is left out, so that saturated outputs hide nothing.

    Args:
        counted: weights of the outputs in the loss, broadcastable to (n, t, c), where zeros do not
            count; None if all do.
    """

    counted: Tensor | None

    def vectors(
        self, likelihood: Likelihood, f: Tensor, y: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """Some vectors (n, t, c)."""
        for _ in range(VECTORS):
            signs = torch.randint(2, f.shape, generator=generator).to(f) * 2 - 1
            yield signs if self.counted is None else signs * (self.counted != 0)


def sharing_groups(passed: ForwardPass) -> list[Group]:
    """Groups with Kronecker factors whose weights meet several rows of an example.

    The block of a bias alone is exact under reduce.
    """
    return [
        group
        for group in passed.knowledge.groups
        if group.treatment == "kron" and group.role != "bias" and _shares(passed, group)
    ]


def _shares(passed: ForwardPass, group: Group) -> bool:
    terms = passed.terms[group.name]
    several = len({term.start for term in terms}) < len(terms)
    return several or any(term.inputs.count > passed.n for term in terms)


def relative_traces(
    passed: ForwardPass, groups: Sequence[Group]
) -> dict[str, dict[PartSetting, Tensor]]:
    """Traces of K-FAC's blocks in units of the exact ones, by setting, for each of the b blocks.

    Args:
        passed: a pass over a few examples, its groups known.
        groups: groups with Kronecker factors.

    Returns:
        For each group and setting a tensor (b,), 1 where nothing has any curvature.
    """
    few = passed.knowing(replace(passed.knowledge, groups=tuple(groups)))
    signs = Signs(passed.weights)
    exact = {
        name: block.values.double().sum((-2, -1))
        for name, block in _blocks(few, Plan("diag", {}, signs)).items()
        if isinstance(block, DiagonalBlock)
    }
    found: dict[str, dict[PartSetting, Tensor]] = {group.name: {} for group in groups}
    for setting in get_args(PartSetting):
        settings = dict.fromkeys(found, setting)
        for name, block in _blocks(few, Plan("kron", settings, signs)).items():
            assert isinstance(block, KroneckerBlock)
            trace, whole = _traces(block), exact[name]
            found[name][setting] = torch.where(whole > 0, trace / whole.where(whole > 0, 1), 1)
    return found


def _blocks(passed: ForwardPass, plan: Plan) -> Mapping[str, object]:
    return estimate(passed, plan, passed.outputs.detach(), Generator().manual_seed(0))


def _traces(block: KroneckerBlock) -> Tensor:
    """tr A · tr B, shape (b,)."""
    inputs, outputs = (factor.double() for factor in block.factors)
    trace = inputs.sum(-1) if inputs.ndim == 2 else inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace * outputs.diagonal(dim1=-2, dim2=-1).sum(-1)
