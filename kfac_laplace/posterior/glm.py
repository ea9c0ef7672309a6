"""The linearised posterior over outputs: f(x) ~ N(f_θ*(x), J P⁻¹ Jᵀ), with J kept in factors.

No (n, c, p) Jacobian is made: each block contributes from the gradient rows of its layers, a chunk
of inputs at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_laplace.curvature.forward import Batch, undisturbed
from kfac_laplace.curvature.network import Pass
from kfac_laplace.curvature.precision import without_autocast
from kfac_laplace.curvature.probing import learn_groupings
from kfac_laplace.curvature.sums import flat_gradients
from kfac_laplace.posterior.gaussian import Posterior
from kfac_laplace.posterior.normal import BlockNormal, covariance, outer_covariance

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


def output_gaussian(posterior: Posterior, batch: Batch) -> OutputGaussian:
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


def output_features(posterior: Posterior, batch: Batch) -> list[Tensor]:
    """Features φ (n k, d), one matrix a block, whose φ φᵀ add up to the covariance of all outputs.

    Args:
        posterior: the posterior.
        batch: the inputs.
    """
    network = posterior.curvature.network
    with undisturbed(network.model):
        passed = network.run(batch, posterior.parameters)
        return [
            normal.features(gradients).movedim(1, 0).flatten(0, 1)
            for normal, gradients in _matrices(posterior, passed)
        ]


def _chunk(posterior: Posterior, passed: Pass) -> OutputGaussian:
    """Mean and covariance at the inputs of one pass."""
    f = passed.outputs
    learn_groupings(passed)
    total = f.new_zeros(passed.n, f[0].numel(), f[0].numel()).detach()
    if posterior.curvature.hessian_structure == "full":
        for normal, gradients in _matrices(posterior, passed):
            total += covariance(normal, gradients)
        return OutputGaussian(f.detach(), total, passed.recording.output.shape)
    groups = passed.network.groups
    rows = passed.rows(_unit_vectors(f), groups)
    generic = passed.generic_gradients(groups, _unit_vectors(f))
    with without_autocast(f.device):
        for group in groups:
            if group.name in generic:
                gradients = generic[group.name]
                total += covariance(_normal(posterior, group.name, gradients), gradients)
                continue
            outer = passed.outer(group, rows)
            if outer is not None:
                total += outer_covariance(_normal(posterior, group.name, outer.left), outer)
    return OutputGaussian(f.detach(), total, passed.recording.output.shape)


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
