"""The linearised posterior over outputs: f(x) ~ N(f_θ*(x), J P⁻¹ Jᵀ), with J kept in factors.

No (n, c, p) Jacobian is made: each block contributes from the gradient rows of its layers, a chunk
of inputs at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.batches import AnyBatch
from kfac_laplace.curvature.forward import undisturbed
from kfac_laplace.curvature.groups import Group
from kfac_laplace.curvature.passes import Pass
from kfac_laplace.curvature.precision import without_autocast
from kfac_laplace.curvature.probing import learn_groupings
from kfac_laplace.curvature.sums import flat_gradients
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.normal import BlockNormal, covariance, factored_covariance

#: Gradient rows of so many entries at most are held for one chunk of inputs.
ROW_BUDGET = 2**25


@dataclass(frozen=True)
class OutputGaussian:
    """Mean and covariance of the outputs at n inputs.

    Args:
        mean: f_θ*(x), shape (n, t, c).
        covariance: shape (n, k, k) with k = t·c.
        shape: shape of the model's output.
    """

    mean: Tensor
    covariance: Tensor
    shape: torch.Size

    @property
    def by_row(self) -> Tensor:
        """Covariance of each output row, shape (n, t, c, c)."""
        n, t, c = self.mean.shape
        rows = self.covariance.reshape(n, t, c, t, c).diagonal(dim1=1, dim2=3)  # (n, c, c, t)
        return rows.movedim(-1, 1)

    def double(self) -> "OutputGaussian":
        """The same in float64."""
        return OutputGaussian(self.mean.double(), self.covariance.double(), self.shape)


def output_gaussian(posterior: Posterior, batch: AnyBatch) -> OutputGaussian:
    """Mean and covariance of the outputs, each input on its own [REDUX21].

    Args:
        posterior: the posterior; the model runs at its mode, whatever its weights are now.
        batch: the inputs.
    """
    curvature = posterior.curvature
    network = curvature.network
    outputs = max(1, curvature.n_outputs // curvature.n_data)
    step = max(1, ROW_BUDGET // (outputs * network.row_entries))
    with undisturbed(network.model):
        parts = [
            _chunk(posterior, network.run(piece, posterior.parameters))
            for piece in batch.split(step)
        ]
    return OutputGaussian(
        torch.cat([part.mean for part in parts]),
        torch.cat([part.covariance for part in parts]),
        torch.Size((sum(len(part.mean) for part in parts), *parts[0].shape[1:])),
    )


def output_features(posterior: Posterior, batch: AnyBatch) -> list[Tensor]:
    """Features φ (n k, d), one matrix a block, whose φ φᵀ add up to the covariance of all outputs.

    Args:
        posterior: the posterior.
        batch: the inputs.
    """
    network = posterior.curvature.network
    with undisturbed(network.model):
        passed = network.run(batch, posterior.parameters)
        return [
            _by_row(passed, normal.features(gradients).movedim(1, 0)).flatten(0, 1)
            for normal, gradients in _matrices(posterior, passed)
        ]


def _by_row(passed: Pass, features: Tensor) -> Tensor:
    """Features (n, t c, d) of each example as (rows, c, d) where output rows are nodes."""
    if passed.output_segments is None:
        return features
    c = passed.outputs.shape[-1]
    return passed.output_segments.rows_of(features.unflatten(1, (-1, c)))


def _chunk(posterior: Posterior, passed: Pass) -> OutputGaussian:
    """Mean and covariance at the inputs of one pass."""
    f = passed.outputs
    learn_groupings(passed)
    total = f.new_zeros(passed.n, f[0].numel(), f[0].numel()).detach()
    if posterior.curvature.hessian_structure == "full":
        for normal, gradients in _matrices(posterior, passed):
            total += covariance(normal, gradients)
        return _gaussian(passed, total)
    groups = passed.network.groups
    rows = passed.rows(_unit_vectors(f), groups)
    generic = passed.generic_gradients(groups, _unit_vectors(f))
    with without_autocast(f.device):
        for group in groups:
            found = _group_covariance(posterior, passed, group, (rows, generic))
            if found is not None:
                total += found
    return _gaussian(passed, total)


def _gaussian(passed: Pass, covariance: Tensor) -> OutputGaussian:
    """Mean and covariance (n, k, k) of a pass; of nodes each on its own."""
    found = OutputGaussian(passed.outputs.detach(), covariance, passed.recording.output.shape)
    if passed.output_segments is None:
        return found
    rows = passed.output_segments.rows_of(found.by_row)  # (nodes, c, c)
    return OutputGaussian(passed.output_rows.detach(), rows, found.shape)


def _group_covariance(
    posterior: Posterior,
    passed: Pass,
    group: Group,
    gradients: tuple[Mapping[int, Tensor], Mapping[str, Tensor]],
) -> Tensor | None:
    """A group's share of the output covariance (n, k, k); None where outputs ignore it."""
    if group.factored:
        factored = passed.gradient(group, gradients[0])
        if factored is None:
            return None
        normal = _normal(posterior, group.name, factored.left)
        return factored_covariance(normal, factored, group.layout.size)
    pieces = [
        covariance(_normal(posterior, group.name, piece), piece)
        for piece in passed.pieces(group, *gradients)
    ]
    return torch.cat(pieces) if pieces else None


def _matrices(posterior: Posterior, passed: Pass) -> Iterator[tuple[BlockNormal, Tensor]]:
    """Each block's posterior with the gradients (k, n, b, o, i) of all k outputs."""
    f, groups = passed.outputs, passed.network.groups
    learn_groupings(passed)
    rows = passed.rows(_unit_vectors(f), groups)
    generic = passed.generic_gradients(groups, _unit_vectors(f))
    if posterior.curvature.hessian_structure == "full":
        gradients = passed.gradients(groups, rows, generic)
        flat = flat_gradients(gradients, posterior.curvature.full_layout)
        yield _normal(posterior, "full", flat), flat[:, :, None, None]
        return
    for group in groups:
        gradients = passed.gradients([group], rows, generic)
        if not gradients:  # the outputs do not depend on this group
            empty = f.new_zeros(f[0].numel(), passed.n, *group.layout.matrix)
            yield _normal(posterior, group.name, empty), empty
        else:
            packed = group.layout.pack(gradients)
            yield _normal(posterior, group.name, packed), packed


def _normal(posterior: Posterior, name: str, gradients: Tensor) -> BlockNormal:
    """A block's posterior in the precision of its gradients."""
    return posterior.blocks_in(gradients.dtype)[name]


def _unit_vectors(f: Tensor) -> list[Tensor]:
    """One backward vector (n, t, c) for each of the k outputs of an example."""
    units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device)
    return [unit.reshape(f.shape[1:]).expand_as(f) for unit in units]
