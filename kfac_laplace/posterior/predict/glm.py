"""The linearised posterior over outputs: f(x) ~ N(f_θ*(x), J P⁻¹ Jᵀ), with J kept in factors.

No (n, c, p) Jacobian is made: each block contributes from the gradient rows of its layers, a chunk
of inputs at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.by_group import (
    block_gradients,
    block_pieces,
    copied_gradients,
    factored_gradient,
    flat_gradients,
)
from kfac_laplace.curvature.gradients.forward_pass import ForwardPass
from kfac_laplace.curvature.gradients.groups import Group
from kfac_laplace.curvature.linalg.dtypes import without_autocast
from kfac_laplace.curvature.model.batches import AnyBatch
from kfac_laplace.curvature.model.budget import at_once
from kfac_laplace.curvature.model.unchanged import undisturbed
from kfac_laplace.posterior.block import BlockNormal, SpectralNormal
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.passes import recorded
from kfac_laplace.posterior.predict.finite import COVARIANCE, INPUTS, finite
from kfac_laplace.posterior.predict.products import covariance, factored_covariance


@dataclass(frozen=True)
class OutputGaussian:
    """Mean and covariance of each output row at n inputs, whatever the rows have in common.

    Args:
        mean: f_θ*(x), shape (n, t, c).
        covariance: shape (n, t, c, c).
        shape: shape of the model's output.
        head: the share in the covariance of the layer that is used last, shape (n, t, c, c).
    """

    mean: Tensor
    covariance: Tensor
    shape: torch.Size
    head: Tensor

    def double(self) -> "OutputGaussian":
        """The same in float64."""
        mean, covariance, head = self.mean.double(), self.covariance.double(), self.head.double()
        return OutputGaussian(mean, covariance, self.shape, head)

    def to(self, device: torch.device | str) -> "OutputGaussian":
        """The same on a device."""
        moved = (tensor.to(device) for tensor in (self.mean, self.covariance, self.head))
        mean, covariance, head = moved
        return OutputGaussian(mean, covariance, self.shape, head)


def output_gaussian(posterior: Posterior, batch: AnyBatch) -> OutputGaussian:
    """Mean and covariance of each output row, each input on its own [REDUX21].

    Inputs are taken a few at a time, and so are the output rows of an input that has many.

    Args:
        posterior: the posterior; the model runs at its mode, whatever its weights are now.
        batch: the inputs.

    Raises:
        InvalidValue: an output or a covariance that is not finite.
    """
    with undisturbed(posterior.network.model):
        parts = [
            _moments(posterior, recorded(posterior, piece))
            for piece in batch.split(_inputs_at_once(posterior, batch))
        ]
        if len({part.mean.shape[1:] for part in parts}) > 1:  # sequences as long as the longest
            parts = [_moments(posterior, recorded(posterior, batch))]
    mean = finite(torch.cat([part.mean for part in parts]), "outputs of the model", INPUTS)
    covariances = torch.cat([part.covariance for part in parts])
    spread = finite(covariances, "covariance of the outputs", COVARIANCE)
    head = torch.cat([part.head for part in parts])  # finite where the sum is
    return OutputGaussian(mean, spread, torch.Size((len(mean), *parts[0].shape[1:])), head)


def output_mean(posterior: Posterior, batch: AnyBatch) -> tuple[Tensor, torch.Size]:
    """f_θ*(x) alone, shape (n, t, c), and the shape of the model's output.

    Arguments and errors as for `output_gaussian`.
    """
    with undisturbed(posterior.network.model):
        pieces = batch.split(_inputs_at_once(posterior, batch))
        parts = [_rows(recorded(posterior, piece)) for piece in pieces]
        if len({rows.shape[1:] for rows, _ in parts}) > 1:  # sequences as long as the longest
            parts = [_rows(recorded(posterior, batch))]
    mean = finite(torch.cat([rows for rows, _ in parts]), "outputs of the model", INPUTS)
    return mean, torch.Size((len(mean), *parts[0][1][1:]))


def _rows(passed: ForwardPass) -> tuple[Tensor, torch.Size]:
    """Aligned outputs (rows, t, c) of a pass, and the shape of its outputs as they are."""
    return passed.output_rows.detach(), passed.recording.output.shape


def output_features(posterior: Posterior, batch: AnyBatch) -> list[Tensor]:
    """Features φ (n k, d), one matrix a block, whose φ φᵀ add up to the covariance of all outputs.

    Args:
        posterior: the posterior.
        batch: the inputs.
    """
    with undisturbed(posterior.network.model):
        passed = recorded(posterior, batch)
        vectors = _unit_vectors(passed.outputs)
        return [
            _by_row(passed, normal.features(found).movedim(1, 0)).flatten(0, 1)
            for normal, found in _matrices(posterior, passed, vectors)
        ]


def _by_row(passed: ForwardPass, features: Tensor) -> Tensor:
    """Features (n, t c, d) of each example as (rows, c, d) where output rows are nodes."""
    if passed.output_segments is None:
        return features
    c = passed.outputs.shape[-1]
    return passed.output_segments.rows_of(features.unflatten(1, (-1, c)))


def _inputs_at_once(posterior: Posterior, batch: AnyBatch) -> int:
    """How many inputs to run together, so that one output row of each stays under the budget."""
    ggn, network = posterior.ggn, posterior.network
    outputs = max(1, round(ggn.n_outputs / ggn.n_data)) if ggn.n_data else 1
    some = next(iter(posterior.mode_for_model.values()))
    budget = network.budget.gradient_rows(some) // _entries(ggn)
    if batch.n <= budget // outputs:
        return batch.n
    with torch.no_grad():  # one output row of several
        alone: Iterator[AnyBatch] = batch.split(1)
        one = network.output(next(alone), ggn.knowledge, posterior.mode_for_model)
    c = ggn.likelihood.align(one, ggn.knowledge.class_axis).shape[-1]
    return max(1, budget // c)


def _entries(ggn: GGN) -> int:
    """Entries that an example and a backward vector hold, over all uses of parameters."""
    if ggn.options.one_block is not None:  # whole gradients
        return max(1, sum(each.count for each in ggn.knowledge.entries.values()))
    generic = sum(g.layout.size for g in ggn.groups if g.role == "generic")
    return ggn.knowledge.row_entries + generic


def _moments(posterior: Posterior, passed: ForwardPass) -> OutputGaussian:
    """Mean and covariances at the inputs of one pass, its nodes or examples as rows."""
    f = passed.outputs
    n, t, c = f.shape
    step = at_once(n * c * _entries(posterior.ggn), passed.budget.gradient_rows(f))
    rows = []
    for start in range(0, t, step):
        vectors = _unit_vectors(f, start * c, (start + step) * c)
        rows.append(_covariances(posterior, passed, vectors, c))
    covariance, head = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    if passed.output_segments is not None:  # nodes, each on its own
        covariance, head = (passed.output_segments.rows_of(m)[:, None] for m in (covariance, head))
    return OutputGaussian(
        passed.output_rows.detach(), covariance, passed.recording.output.shape, head
    )


def _covariances(
    posterior: Posterior, passed: ForwardPass, vectors: list[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """Covariances (n, v / width, width, width) of those outputs that the vectors pick.

    Returns:
        By all parameters, and by those of the layer that is used last.
    """
    total = passed.outputs.new_zeros(passed.n, len(vectors) // width, width, width).detach()
    last = used_last(passed, posterior.ggn.groups)
    with without_autocast(total.device):
        if posterior.ggn.options.one_block is not None:
            own = entries_inside(posterior.ggn, last).to(total)
            for normal, found in _matrices(posterior, passed, vectors):
                total += covariance(normal, found, width)
                head = covariance(normal, found * own, width)
            return total, head
        head = torch.zeros_like(total)
        rows = passed.rows(vectors, posterior.ggn.groups)
        copied = copied_gradients(passed, vectors)
        for group in posterior.ggn.groups:
            if group.name in last:
                share = torch.zeros_like(total)
                _add_group(posterior, passed, group, (rows, copied), share)
                head += share
                total += share
            else:
                _add_group(posterior, passed, group, (rows, copied), total)
    return total, head


def used_last(passed: ForwardPass, groups: Sequence[Group]) -> set[str]:
    """Names of the groups of the posterior's layer that is used last; of all without a layer."""
    layers = [use.params for use in passed.recording.uses if use.layer.kronecker]
    names = {group.name: layers and not set(layers[-1]).isdisjoint(group.layout.params)
             for group in groups}  # fmt: skip
    return {name for name, found in names.items() if found} or set(names)


def entries_inside(ggn: GGN, names: set[str]) -> Tensor:
    """1 where an entry of all parameters behind one another is in these groups, else 0, (p,)."""
    inside = {p for group in ggn.groups if group.name in names for p in group.layout.params}
    entries = ggn.knowledge.entries.items()
    return torch.cat(
        [torch.full((each.count,), float(name in inside), device="cpu") for name, each in entries]
    )


def _add_group(
    posterior: Posterior,
    passed: ForwardPass,
    group: Group,
    known: tuple[Mapping[int, Tensor], Mapping[str, Tensor]],
    total: Tensor,
) -> None:
    """Add a group's share to the covariances (n, v / width, width, width) in `total`."""
    width = total.shape[-1]
    if group.factored and group.part is None:
        factored = factored_gradient(passed, group, known[0])
        if factored is not None:
            normal = block_normal(posterior, group.name, factored.left)
            assert isinstance(normal, SpectralNormal)
            total += factored_covariance(normal, factored, width, passed.budget)
        return
    start = 0
    for piece in block_pieces(passed, group, *known):
        stop = start + piece.shape[1]
        total[start:stop] += covariance(block_normal(posterior, group.name, piece), piece, width)
        start = stop


def _matrices(
    posterior: Posterior, passed: ForwardPass, vectors: list[Tensor]
) -> Iterator[tuple[BlockNormal, Tensor]]:
    """Each block's posterior with the gradients (v, n, b, o, i) of v backward vectors."""
    f, groups = passed.outputs, posterior.ggn.groups
    rows = passed.rows(vectors, groups)
    copied = copied_gradients(passed, vectors)
    if (whole := posterior.ggn.options.one_block) is not None:
        layout = posterior.ggn.knowledge.full_layout
        flat = flat_gradients(passed, layout, (rows, copied))
        if flat is None:  # the outputs depend on no parameter
            flat = f.new_zeros(len(vectors), passed.n, layout.size)
        yield block_normal(posterior, whole, flat), flat[:, :, None, None]
        return
    for group in groups:
        found = block_gradients(passed, group, rows, copied)
        if found is None:  # the outputs do not depend on this group
            found = f.new_zeros(len(vectors), passed.n, *group.block_layout.matrix)
        yield block_normal(posterior, group.name, found), found


def block_normal(posterior: Posterior, name: str, like: Tensor) -> BlockNormal:
    """A block's posterior in the precision of its gradients."""
    return posterior.blocks_in(like.dtype)[name]


def _unit_vectors(f: Tensor, first: int = 0, last: int | None = None) -> list[Tensor]:
    """One backward vector (n, t, c) for each of the k outputs of an example, or some of them."""
    k = f[0].numel()
    vectors = []
    for output in range(first, min(k, k if last is None else last)):
        unit = torch.zeros(k, dtype=f.dtype, device=f.device)
        unit[output] = 1
        vectors.append(unit.reshape(f.shape[1:]).expand_as(f))
    return vectors
