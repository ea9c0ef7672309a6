"""What reduce loses: gradients of an example that cancel where its rows are put together.

The gradients of attention keys do, and those of a module that compares two things, as in
f(a) − f(b). Traces say so, of each layer's B and of its block beside the exact one, on a few
examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.blocks import DiagonalBlock, KroneckerBlock
from kfac_laplace.curvature.estimate.estimator import Plan, estimate
from kfac_laplace.curvature.estimate.settings import PartSetting, Setting
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.likelihoods import Likelihood

#: Examples looked at, and how many vectors of signs altogether: sums over so many show a factor.
EXAMPLES = 8
VECTORS = 16
#: Gradients cancel where their sums by example are so small, squared, beside themselves: those of
#: positions that have nothing to do with each other give 1, or half of it by chance, and more.
CANCELS = 0.2
#: Where only a few examples were seen, chance gives less; what cancels by construction gives zero.
CANCELS_SURELY = 1e-6
SETTINGS: tuple[PartSetting, ...] = ("reduce", "expand")
#: Of the exact trace, reduce has to keep so much where gradients cancel.
LEAST_TRACE = 0.25


@dataclass(frozen=True)
class Shares:
    """What K-FAC keeps of the b blocks of a weight, each a tensor (b,).

    Args:
        reduce: trace under reduce in units of the exact one; 1 where nothing has any curvature.
        expand: likewise under expand.
        gradients: Σ_n ‖Σ_r b‖² in units of Σ_n Σ_r ‖b‖².
        limit: below which these are taken to cancel.
    """

    reduce: Tensor
    expand: Tensor
    gradients: Tensor
    limit: float

    @property
    def cancel(self) -> Tensor:
        """Where reduce sees next to no curvature because gradients cancel, and expand sees it."""
        tiny = torch.finfo(torch.float64).tiny
        nearer = self.expand.clamp_min(tiny).log().abs() < self.reduce.clamp_min(tiny).log().abs()
        return (self.gradients < self.limit) & (self.reduce < LEAST_TRACE) & nearer

    def setting(self, parts: int) -> Setting:
        """Reduce, but expand for those of a weight's parts whose gradients cancel."""
        blind = self.cancel.unflatten(0, (parts, -1)).any(1).tolist()
        found: tuple[PartSetting, ...] = tuple("expand" if part else "reduce" for part in blind)
        return found[0] if len({*found}) == 1 else found


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
        for _ in range(-(-VECTORS // len(f))):
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
    return _has_uses(passed, group) or any(term.inputs.count > passed.n for term in terms)


def _has_uses(passed: ForwardPass, group: Group) -> bool:
    """Whether a weight, or a part of it, is used several times."""
    terms = passed.terms[group.name]
    return len({term.start for term in terms}) < len(terms)


def shares(passed: ForwardPass, groups: Sequence[Group]) -> dict[str, Shares]:
    """What K-FAC keeps of some groups' blocks.

    Args:
        passed: a pass over a few examples, its groups known.
        groups: groups with Kronecker factors.
    """
    few = passed.knowing(replace(passed.knowledge, groups=tuple(groups)))
    signs = Signs(passed.weights)
    exact = {
        name: block.values.double().sum((-2, -1))
        for name, block in _blocks(few, Plan("diag", {}, signs)).items()
        if isinstance(block, DiagonalBlock)
    }
    reduce, expand = (
        {name: _traces(block) for name, block in _blocks(few, plan).items()}
        for plan in (Plan("kron", dict.fromkeys(exact, setting), signs) for setting in SETTINGS)
    )
    found = {}
    for group in groups:
        (a, b), (c, d), whole = reduce[group.name], expand[group.name], exact[group.name]
        few_seen = passed.n < EXAMPLES and not _has_uses(passed, group)
        limit = CANCELS_SURELY if few_seen else CANCELS
        found[group.name] = Shares(_ratio(a * b, whole), _ratio(c * d, whole), _ratio(b, d), limit)
    return found


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), 1)


def _blocks(passed: ForwardPass, plan: Plan) -> Mapping[str, object]:
    return estimate(passed, plan, passed.outputs.detach(), Generator().manual_seed(0))


def _traces(block: object) -> tuple[Tensor, Tensor]:
    """tr A and tr B, shape (b,)."""
    assert isinstance(block, KroneckerBlock)
    inputs, outputs = (factor.double() for factor in block.factors)
    trace = inputs.sum(-1) if inputs.ndim == 2 else inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace, outputs.diagonal(dim1=-2, dim2=-1).sum(-1)
