"""What reduce loses: gradients of an example that cancel where its rows are put together.

The gradients of attention keys do, and those of a module that compares two things, as in
f(a) − f(b). Traces say so, of each layer's B and of its block beside the exact one, on a few
examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from kfac_laplace.curvature.estimate.blocks import KroneckerBlock
from kfac_laplace.curvature.estimate.estimator import Estimand, estimate_all
from kfac_laplace.curvature.estimate.exact_blocks import DiagonalBlock
from kfac_laplace.curvature.estimate.settings import PartSetting, Setting
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.likelihoods import Likelihood

#: Examples looked at, and how many vectors altogether: sums over so many show a factor.
EXAMPLES = VECTORS = 16
#: Gradients cancel where their sums by example are so small, squared, beside themselves, while
#: reduce keeps so little of the exact trace. Those of positions that have nothing to do with each
#: other give 1. Rotary keys keep more gradient and less trace than comparisons do.
CANCELS = ((0.2, 0.25), (0.5, 0.1))
#: Fewer examples show only what cancels by construction: chance gives single ones next to nothing.
ENOUGH = 8
CANCELS_SURELY = 1e-6
#: A layer is blind where so many of its outputs are, as the keys among queries, keys and values.
BLIND_OUTPUTS = 0.25
SETTINGS: tuple[PartSetting, ...] = ("reduce", "expand")


@dataclass(frozen=True)
class Shares:
    """What K-FAC keeps of the b blocks of a weight, each a tensor (b,).

    Args:
        reduce: trace under reduce in units of the exact one; 1 where nothing has any curvature.
        expand: likewise under expand.
        gradients: Σ_n ‖Σ_r b‖² in units of Σ_n Σ_r ‖b‖².
        blind_outputs: share of the layer's outputs whose gradients cancel by construction.
        sure: up to which share of themselves these are nothing but rounding.
        enough: whether there were enough examples to tell other cancellation from chance.
    """

    reduce: Tensor
    expand: Tensor
    gradients: Tensor
    blind_outputs: Tensor
    sure: float
    enough: bool

    @property
    def cancel(self) -> Tensor:
        """Where reduce sees next to no curvature because gradients cancel, and expand sees it."""
        tiny = torch.finfo(torch.float64).tiny
        nearer = self.expand.clamp_min(tiny).log().abs() < self.reduce.clamp_min(tiny).log().abs()
        found = self.gradients < self.sure
        for gradients, trace in CANCELS if self.enough else ():
            found = found | ((self.gradients < gradients) & (self.reduce < trace))
        blind = self.blind_outputs >= BLIND_OUTPUTS
        if not self.enough:  # of one graph, nearly all may cancel that does not in others
            blind = blind & (self.reduce > CANCELS[0][1])
        return (found & nearer) | blind

    def setting(self, parts: int) -> Setting:
        """Reduce, but expand for those of a weight's parts whose gradients cancel."""
        blind = self.cancel.unflatten(0, (parts, -1)).any(1).tolist()
        found: tuple[PartSetting, ...] = tuple("expand" if part else "reduce" for part in blind)
        return found[0] if len({*found}) == 1 else found


@dataclass(frozen=True)
class Unsaturated:
    """Vectors v with E v vᵀ = Λ at outputs of zero.

    What cancels through Λ cancels in them, as a common shift of all logits does. Saturated outputs
    hide nothing here.

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
            vector = _root(likelihood, f, generator)
            yield vector if self.counted is None else vector * (self.counted != 0)


def _root(likelihood: Likelihood, f: Tensor, generator: Generator) -> Tensor:
    """A root of Λ at zero; random signs for likelihoods that have none there."""
    try:
        root = likelihood.random_root(torch.zeros_like(f), generator)
    except (ValueError, ArithmeticError):  # distributions of users' own may begin above zero
        root = torch.full_like(f, torch.nan)
    if bool(root.isfinite().all()) and bool(root.any()):
        return root
    return torch.randint(2, f.shape, generator=generator, device="cpu").to(f) * 2 - 1


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
    roots = Unsaturated(passed.weights)
    names = [group.name for group in groups]
    factors = [Estimand("kron", dict.fromkeys(names, s), roots, widest=0) for s in SETTINGS]
    estimands = [Estimand("diag", {}, roots), *factors]
    diagonals, *made = estimate_all(few, estimands, roots, passed.outputs.detach())
    exact = {
        name: block.values.double().sum((-2, -1))
        for name, block in diagonals.items()
        if isinstance(block, DiagonalBlock)
    }
    reduce, expand = ({name: _traces(block) for name, block in own.items()} for own in made)
    noise = 30 * torch.finfo(passed.recording.output.dtype).eps ** 2
    sure = max(CANCELS_SURELY, noise)
    found = {}
    for group in groups:
        (a, b), (c, d), whole = reduce[group.name], expand[group.name], exact[group.name]
        seen = d > sure * d.amax(-1, keepdim=True)
        blind = ((b < sure * d) & seen).sum(-1) / seen.sum(-1).clamp_min(1)
        b, d = b.sum(-1), d.sum(-1)
        found[group.name] = Shares(
            reduce=_ratio(a * b, whole),
            expand=_ratio(c * d, whole),
            gradients=_ratio(b, d),
            blind_outputs=blind,
            sure=sure,
            enough=passed.n >= ENOUGH or _has_uses(passed, group),
        )
    return found


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), 1)


def _traces(block: object) -> tuple[Tensor, Tensor]:
    """tr A, shape (b,), and the diagonal of B, (b, o)."""
    assert isinstance(block, KroneckerBlock)
    inputs, outputs = (factor.double() for factor in block.factors)
    trace = inputs.sum(-1) if inputs.ndim == 2 else inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace, outputs.diagonal(dim1=-2, dim2=-1)
