"""The Laplace posterior as a frozen Gaussian: evidence terms, samples, block posteriors.

log q(D) = log p(D | θ*)/T − ½ [log det P − log det P₀ + (θ* − μ)ᵀ P₀ (θ* − μ)] with
P = H/(σ²T) + P₀ and P₀ = diag δ [ML21, eq. 6].
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.gradients.subnetwork import Subnetwork
from kfac_laplace.errors import NotFitted
from kfac_laplace.posterior.block import BlockNormal, DenseNormal, SpectralNormal
from kfac_laplace.posterior.expansion import Expansion
from kfac_laplace.posterior.held import Held
from kfac_laplace.posterior.hyperparameters import Hyperparameters
from kfac_laplace.posterior.log_dets import log_det
from kfac_laplace.posterior.log_table import EXACT, LogTable
from kfac_laplace.posterior.low_rank import LowRankNormal
from kfac_laplace.posterior.prior import Prior


@dataclass(frozen=True)
class Posterior:
    """N(θ*, P⁻¹) with the evidence of its hyperparameters.

    Args:
        expansion: curvature, mode and prior.
        hyperparameters: δ, σ and T.
        informed: whether the data count; without them the posterior is the prior.
    """

    expansion: Expansion
    hyperparameters: Hyperparameters
    informed: bool = True

    @property
    def network(self) -> Network:
        """The model."""
        return self.expansion.network

    @property
    def ggn(self) -> GGN:
        """Its curvature over the data, raw sums at σ = 1 and T = 1."""
        return self.expansion.ggn

    @property
    def mode(self) -> Mapping[str, Tensor]:
        """θ* by parameter name, float64, in model order."""
        return self.expansion.mode

    @property
    def prior(self) -> Prior:
        """The prior as a function of its precisions."""
        return self.expansion.prior

    def at(self, hyperparameters: Hyperparameters) -> "Posterior":
        """The same posterior at other hyperparameters, with all that does not depend on them."""
        return replace(self, hyperparameters=hyperparameters)

    def without_data(self) -> "Posterior":
        """The prior as a posterior, with the model and mode of this one."""
        return replace(self, hyperparameters=self.hyperparameters.detached(), informed=False)

    def with_ggn(self, ggn: GGN) -> "Posterior":
        """The same mode and hyperparameters with the curvature of other data."""
        expansion = Expansion(self.network, ggn, self.mode, self.prior)
        return Posterior(expansion, self.hyperparameters.detached())

    @property
    def apart_from_unused(self) -> "Posterior":
        """The same with the parameters without effect at their prior mean; it itself without any.

        Their integral over the prior is 1 wherever they stand, so that no precision is to be
        judged by where they do: what chooses hyperparameters leaves their scatter out.
        """
        unused = set(self.ggn.knowledge.unused).intersection(self.mode)
        if not unused:
            return self
        mean = {name: self.prior.means[name] for name in unused}
        moved = {name: torch.zeros_like(self.mode[name]) + mean[name] for name in unused}
        expansion = Expansion(self.network, self.ggn, {**self.mode, **moved}, self.prior)
        return replace(self, expansion=expansion)

    @property
    def unused_precisions(self) -> Tensor:
        """Mask (length of the prior,) of precisions that only parameters without effect have."""
        effective, prior = self.ggn.knowledge.effective, self.prior
        mask = torch.ones(prior.length, dtype=torch.bool, device=prior.device)
        for name, layout in prior.layouts.groups.items():
            if effective.intersection(layout.params):
                mask[prior.index[name].flatten()] = False
        return mask

    @property
    def scale(self) -> Tensor:
        """Likelihood precision 1/(σ²T), shape (); 0 without data."""
        hyper = self.hyperparameters
        scale = self.ggn.likelihood.precision(hyper.sigma_noise) / hyper.temperature
        return scale if self.informed else torch.zeros_like(scale)

    @cached_property
    def blocks(self) -> Held:
        """Posterior of each block of the curvature, on the device of the model."""
        return Held(self._blocks(), self.device)

    def _blocks(self) -> dict[str, BlockNormal]:
        """The same wherever their curvature lies."""
        deltas = self.prior.by_group(self.hyperparameters.prior_precision)
        if self.ggn.options.one_block is not None:
            layouts = self.prior.layouts
            spread = {name: deltas[name].expand(la.matrix) for name, la in layouts.groups.items()}
            delta = layouts.flatten(spread)
            part = self.expansion.of_rows
            if part is None:
                return {"full": DenseNormal.of(self.expansion.dense, self.scale, delta)}
            rows, factor = self.ggn.blocks["lowrank"].factors, part.factor(self._weights)
            return {"lowrank": LowRankNormal(rows, factor, self.scale, delta)}
        return {
            name: SpectralNormal(block.spectrum, self.scale, deltas[name])
            for name, block in self.ggn.blocks.items()
        }

    def blocks_in(self, dtype: torch.dtype) -> Mapping[str, BlockNormal]:
        """The blocks in the precision of the model's gradients, made once."""
        if dtype not in self._casts:
            self._casts[dtype] = self.blocks.each(lambda normal: normal.cast(dtype))
        return self._casts[dtype]

    @cached_property
    def _casts(self) -> dict[torch.dtype, Held]:
        return {torch.float64: self.blocks}

    # --- the evidence ------------------------------------------------------------------------

    @property
    def log_likelihood(self) -> Tensor:
        """log p(D | θ*, σ), summed over examples, positions and outputs, before T.

        Raises:
            NotFitted: no pass over the data was made, as where the curvature is an optimiser's.
        """
        ggn = self.ggn
        if self.informed and not self.expansion.knows_fit:
            raise NotFitted(
                "this curvature comes without the log-likelihood of the data, and so without "
                "the evidence",
                where="log_likelihood",
                remedy="Call fit(train_loader), which makes a pass over them",
            )
        fit = ggn.likelihood.log_likelihood(
            ggn.statistic, ggn.n_outputs, self.hyperparameters.sigma_noise
        )
        return fit if self.informed else torch.zeros_like(fit)

    @property
    def log_det_ratio(self) -> Tensor:
        """log det P − log det P₀."""
        table, part = self.expansion.log_table, self.expansion.of_rows
        if part is not None:
            return log_det(part, self._weights)
        if table is None:
            return torch.stack([normal.log_det_ratio() for normal in self.blocks.values()]).sum()
        return (table.weights * softplus(self._log_signals(table), threshold=EXACT)).sum()

    def _log_signals(self, table: LogTable) -> Tensor:
        """log(scale · v/δ) for each value v in the table of logarithms."""
        deltas = self.prior.by_block(self.hyperparameters.prior_precision)
        shift = self.scale.log() - deltas.log()  # (groups,)
        return table.logs + shift[table.group]

    @property
    def _weights(self) -> Tensor:
        """scale/δ of each precision, (length of the prior,)."""
        return self.scale / self.prior.full(self.hyperparameters.prior_precision)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """log det P."""
        return self.log_det_ratio + self.log_det_prior_precision

    @property
    def log_det_prior_precision(self) -> Tensor:
        """log det P₀."""
        return self.prior.log_det(self.hyperparameters.prior_precision)

    @property
    def squares(self) -> Tensor:
        """Σ (θ* − μ)² over the entries that share a precision, shape (length of the prior,)."""
        return self.expansion.squares

    @property
    def scatter(self) -> Tensor:
        """(θ* − μ)ᵀ P₀ (θ* − μ)."""
        precision = self.prior.full(self.hyperparameters.prior_precision)
        return (precision * self.squares).sum()

    @property
    def log_marginal_likelihood(self) -> Tensor:
        """The Laplace evidence log q(D), differentiable in every hyperparameter."""
        fit = self.log_likelihood / self.hyperparameters.temperature
        return fit - 0.5 * (self.log_det_ratio + self.scatter)

    def effective_dimensions(self) -> Tensor:
        """γ: directions that the data determine, by shared precision, (length of the prior,)."""
        if self.expansion.log_table is not None:
            return self.prior.shared_by_block(self.effective_dimensions_by_group())
        if (part := self.expansion.of_rows) is not None:
            weights = self._weights.detach()
            return weights * part.slopes(weights)[1]
        return self.prior.shared_sums(self._directions())

    def effective_dimensions_by_group(self) -> Tensor:
        """γ by group, (groups,)."""
        table = self.expansion.log_table
        if table is not None:
            share = table.weights * self._log_signals(table).sigmoid()
            by_group = share.new_zeros(len(self.prior.layouts.groups))
            return by_group.index_add(0, table.group, share)
        found = self._directions()
        return torch.stack([found[name].sum() for name in self.prior.layouts.groups])

    def _directions(self) -> dict[str, Tensor]:
        """Share of each direction that the data determine, (b, o, i) by group."""
        found = {name: normal.effective_dimensions() for name, normal in self.blocks.items()}
        whole = self.ggn.options.one_block
        return found if whole is None else self.prior.layouts.pack_vector(found[whole][0, 0])

    @property
    def constant_evidence(self) -> float:
        """log p(D) of the best constant prediction over T; NaN where it is not known."""
        ggn = self.ggn
        constant = ggn.likelihood.constant_log_likelihood(ggn.targets)
        return constant / float(self.hyperparameters.temperature)

    # --- the parameters ----------------------------------------------------------------------

    @property
    def mode_for_model(self) -> dict[str, Tensor]:
        """The mode in the dtypes of the model's own parameters, to run it with.

        Raises:
            InvalidValue: one of them is no longer in the model, or has another shape.
        """
        live = self.network.unchanged({name: value.shape for name, value in self.mode.items()})
        return {name: value.to(live[name].dtype) for name, value in self.mode.items()}

    @property
    def drawn(self) -> dict[str, Tensor]:
        """What draws are vectors of: the mode; all of the model's parameters for a subnetwork."""
        if not isinstance(self.ggn.options.subset_of_weights, Subnetwork):
            return dict(self.mode)
        live = self.network.parameters(tuple(self.network.shapes))
        return {name: value.detach().double() for name, value in live.items()} | dict(self.mode)

    def deviations(
        self, n: int, generator: Generator, kept: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Draws of θ − θ* by parameter name, shape (n, *shape), float64; zero where not random.

        Args:
            n: number of draws.
            generator: source of the randomness.
            kept: which of the draws are wanted: the others only use up their random numbers.
        """
        colours = {}
        for name, normal in self.blocks.items():
            shape = self.ggn.blocks[name].layout.matrix
            noise = torch.randn(
                n, *shape, dtype=torch.float64, generator=generator, device=generator.device
            )
            colours[name] = normal.colour(noise[kept].to(self.device))
        layouts, whole = self.prior.layouts, self.ggn.options.one_block
        flat = layouts.flatten(colours) if whole is None else colours[whole][:, 0, 0]
        return layouts.by_parameter(flat)

    @property
    def device(self) -> torch.device:
        """Device of the mode and the blocks."""
        return next(iter(self.mode.values())).device
