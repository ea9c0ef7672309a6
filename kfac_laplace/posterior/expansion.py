"""What a posterior is before its hyperparameters: the expansion of the log joint at the mode."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kfac_laplace.curvature.backend import Curvature
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.linalg.dtypes import in_double
from kfac_laplace.likelihoods import check_finite
from kfac_laplace.posterior.log_dets import Grams, Wide
from kfac_laplace.posterior.log_table import LogTable
from kfac_laplace.posterior.prior import Prior


@dataclass(frozen=True)
class Expansion:
    """Curvature at a mode under a prior, and what follows without any hyperparameter.

    Copies of a posterior at other hyperparameters share one expansion, so that what it finds is
    found once. All of it is of use inside and outside inference mode.

    Args:
        network: the model.
        ggn: its curvature over the data, raw sums at σ = 1 and T = 1.
        mode: θ* by parameter name, float64, in model order.
        prior: as a function of its precisions.
    """

    network: Network
    ggn: GGN
    mode: Mapping[str, Tensor]
    prior: Prior

    @cached_property
    def log_table(self) -> LogTable | None:
        """The eigenvalues of all blocks together, where each block has one prior precision."""
        if self.ggn.options.one_block or not self.prior.constant_on_blocks:
            return None
        blocks = self.ggn.blocks
        spectra = [blocks[name].spectrum for name in self.prior.layouts.groups]
        return LogTable.of(spectra, self.prior.device)

    @cached_property
    def knows_fit(self) -> bool:
        """Whether the data's log-likelihood is known, which takes a pass over them."""
        return not bool(self.ggn.statistic.isnan().any())

    @cached_property
    def dense(self) -> Tensor:
        """The one block of hessian_structure="full", float64 (p, p)."""
        with torch.inference_mode(False):
            return self.ggn.blocks["full"].dense().double()

    @cached_property
    def of_rows(self) -> Grams | Wide | None:
        """The log-determinant of the rows of a low-rank structure, by few numbers where it can be.

        Gram matrices of as many precisions as there are, unless they are larger than the rows.
        """
        if self.ggn.options.structure != "lowrank":
            return None
        with torch.inference_mode(False), torch.no_grad():
            block, prior = self.ggn.blocks["lowrank"], self.prior
            rows, index = block.factors, self._precision_of_entries
            if not prior.constant_on_blocks or prior.length * len(rows) > prior.size:
                return Wide(in_double(rows), index, prior.length)
            parts = (in_double(rows[:, index == place]) for place in range(prior.length))
            grams = torch.stack([part @ part.mT for part in parts])
            return Grams(grams, torch.arange(prior.length, device=rows.device), prior.length)

    @property
    def _precision_of_entries(self) -> Tensor:
        """The place of the precision of each entry, in parameter order, (p,)."""
        layouts, index = self.prior.layouts, self.prior.index
        spread = {name: index[name].expand(la.matrix) for name, la in layouts.groups.items()}
        return layouts.flatten(spread)

    @cached_property
    def squares(self) -> Tensor:
        """Σ (θ* − μ)² over the entries that share a precision, shape (length of the prior,)."""
        with torch.inference_mode(False):
            return self.prior.squares(self.mode)

    @cached_property
    def curvature(self) -> Tensor:
        """Σ H_kk over the entries that share a precision, at σ = T = 1, (length of the prior,)."""
        with torch.inference_mode(False), torch.no_grad():
            if self.of_rows is not None:
                return self.of_rows.traces
            if self.ggn.options.hessian_structure == "full":
                return self.prior.shared_sums(self.prior.layouts.pack_vector(self.dense.diagonal()))
            spectra = {name: block.spectrum for name, block in self.ggn.blocks.items()}
            # v/(v + c) is v/c for c far above all v, and exactly zero with v.
            logs = torch.cat([each.logs.logs.to(self.prior.device) for each in spectra.values()])
            c = torch.cat([logs, logs.new_zeros(1)]).max().exp() * 1e18
            one = torch.ones_like(c)
            shares = {
                name: each.to(self.prior.device).effective_dimensions(one, c)
                for name, each in spectra.items()
            }
            return c * self.prior.shared_sums(shares)


def mode_of(curvature: Curvature) -> dict[str, Tensor]:
    """The model's present values of the parameters of a curvature, float64, copied.

    Raises:
        InvalidValue: not finite.
    """
    live = curvature.network.parameters(curvature.params)
    with torch.inference_mode(False):
        mode = {name: value.detach().double().clone() for name, value in live.items()}
    for name, value in mode.items():
        check_finite(value, where=name)
    return mode
