"""The Laplace posterior as a frozen Gaussian: evidence terms, samples, block posteriors.

log q(D) = log p(D | θ*)/T − ½ [log det P − log det P₀ + (θ* − μ)ᵀ P₀ (θ* − μ)] with
P = H/(σ²T) + P₀ and P₀ = diag δ [ML21, eq. 6].
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import softplus

from kfac_laplace.curvature.estimate.blocks import Block
from kfac_laplace.curvature.ggn import GGN
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.posterior.block import BlockNormal, DenseNormal, SpectralNormal
from kfac_laplace.posterior.log_table import EXACT, LogTable
from kfac_laplace.posterior.prior import PriorStructure


@dataclass(frozen=True)
class Hyperparameters:
    """What the evidence is a function of; float64 tensors that may carry gradients.

    Args:
        prior_precision: δ, shape () or (length of the prior structure,).
        sigma_noise: observation noise σ (a standard deviation), shape ().
        temperature: T; low means a concentrated posterior, shape ().
    """

    prior_precision: Tensor
    sigma_noise: Tensor
    temperature: Tensor

    def detached(self) -> "Hyperparameters":
        """The same values without their graphs."""
        return Hyperparameters(
            self.prior_precision.detach(), self.sigma_noise.detach(), self.temperature.detach()
        )


@dataclass(frozen=True)
class Posterior:
    """N(θ*, P⁻¹) with the evidence of its hyperparameters.

    Args:
        network: the model.
        ggn: its curvature over the data, raw sums at σ = 1 and T = 1.
        mode: θ* by parameter name, float64, in model order.
        prior: how precisions are shared.
        prior_mean: μ, shape () or (p,).
        hyperparameters: δ, σ and T.
    """

    network: Network
    ggn: GGN
    mode: Mapping[str, Tensor]
    prior: PriorStructure
    prior_mean: Tensor
    hyperparameters: Hyperparameters
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def at(self, hyperparameters: Hyperparameters) -> "Posterior":
        """The same posterior at other hyperparameters, with all that does not depend on them."""
        return replace(self, hyperparameters=hyperparameters)

    @property
    def scale(self) -> Tensor:
        """Likelihood precision 1/(σ²T), shape ()."""
        hyper = self.hyperparameters
        return self.ggn.likelihood.precision(hyper.sigma_noise) / hyper.temperature

    @cached_property
    def blocks(self) -> dict[str, BlockNormal]:
        """Posterior of each block of the curvature."""
        deltas = self.prior.by_group(self.hyperparameters.prior_precision)
        blocks = self.ggn.blocks
        if self.ggn.options.hessian_structure == "full":
            by_group = {
                name: deltas[name].expand(layout.matrix)
                for name, layout in self.prior.layouts.items()
            }
            matrix = blocks["full"].dense().double()
            return {"full": DenseNormal(matrix, self.scale, self.prior.flatten(by_group))}
        return {
            name: SpectralNormal(block.spectrum, self.scale, deltas[name])
            for name, block in blocks.items()
        }

    def blocks_in(self, dtype: torch.dtype) -> Mapping[str, BlockNormal]:
        """The blocks in the precision of the model's gradients, made once."""
        if dtype not in self._casts:
            self._casts[dtype] = {n: normal.cast(dtype) for n, normal in self.blocks.items()}
        return self._casts[dtype]

    @cached_property
    def _casts(self) -> dict[torch.dtype, dict[str, BlockNormal]]:
        return {torch.float64: self.blocks}

    @property
    def log_likelihood(self) -> Tensor:
        """log p(D | θ*, σ), summed over examples, positions and outputs, before T."""
        ggn = self.ggn
        return ggn.likelihood.log_likelihood(
            ggn.statistic, int(ggn.n_outputs), self.hyperparameters.sigma_noise
        )

    @property
    def log_det_ratio(self) -> Tensor:
        """log det P − log det P₀."""
        if self._by_logs is None:
            return torch.stack([normal.log_det_ratio() for normal in self.blocks.values()]).sum()
        return (self._by_logs.weights * softplus(self._log_signals(), threshold=EXACT)).sum()

    @property
    def _by_logs(self) -> "LogTable | None":
        """The eigenvalues of all blocks together, where each block has one prior precision."""
        if self.ggn.options.hessian_structure == "full" or self.prior.sharing == "diag":
            return None
        if "by_logs" not in self._kept:
            self._kept["by_logs"] = LogTable.of([b.spectrum for b in self._blocks_in_order()])
        return self._kept["by_logs"]

    def _blocks_in_order(self) -> list[Block]:
        """Blocks in the order of the precisions."""
        return [self.ggn.blocks[name] for name in self.prior.layouts]

    def _log_signals(self) -> Tensor:
        """log(scale · v/δ) for each value v in the table of logarithms."""
        assert self._by_logs is not None
        shift = self.scale.log() - self._precisions.log()  # (groups,)
        return self._by_logs.logs + shift[self._by_logs.group]

    @property
    def _precisions(self) -> Tensor:
        """δ of each group, shape (groups,), where it has one."""
        precision = self.prior.full(self.hyperparameters.prior_precision)
        return precision.expand(len(self.prior.layouts))

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """log det P."""
        return self.log_det_ratio + self.log_det_prior_precision

    @property
    def log_det_prior_precision(self) -> Tensor:
        """log det P₀."""
        deltas = self.prior.by_group(self.hyperparameters.prior_precision)
        terms = [
            deltas[name].log().expand(layout.matrix).sum()
            for name, layout in self.prior.layouts.items()
        ]
        return torch.stack(terms).sum()

    @property
    def squared_deviations(self) -> dict[str, Tensor]:
        """(θ* − μ)² of each group as matrices (b, o, i)."""
        if "squares" not in self._kept:
            with torch.inference_mode(False):  # kept, so of use outside inference mode as well
                flat = torch.cat([value.flatten() for value in self.mode.values()])
                self._kept["squares"] = self.prior.pack((flat - self.prior_mean).square())
        found: dict[str, Tensor] = self._kept["squares"]
        return found

    @property
    def shared_squares(self) -> Tensor:
        """Σ (θ* − μ)² over the entries that share a precision, shape (length of the prior,)."""
        if "shared squares" not in self._kept:
            with torch.inference_mode(False):
                self._kept["shared squares"] = self._shared(self.squared_deviations)
        found: Tensor = self._kept["shared squares"]
        return found

    def _shared(self, matrices: Mapping[str, Tensor]) -> Tensor:
        """Sum matrices (b, o, i) by the prior's sharing: shape (length of the prior,)."""
        if self.prior.sharing == "diag":
            return self.prior.flatten(matrices)
        sums = torch.stack([matrices[name].sum() for name in self.prior.layouts])
        return sums.sum().reshape(1) if self.prior.sharing == "scalar" else sums

    @property
    def scatter(self) -> Tensor:
        """(θ* − μ)ᵀ P₀ (θ* − μ)."""
        precision = self.prior.full(self.hyperparameters.prior_precision)
        return (precision * self.shared_squares).sum()

    @property
    def log_marginal_likelihood(self) -> Tensor:
        """The Laplace evidence log q(D), differentiable in every hyperparameter."""
        fit = self.log_likelihood / self.hyperparameters.temperature
        return fit - 0.5 * (self.log_det_ratio + self.scatter)

    def effective_dimensions(self) -> Tensor:
        """γ: directions that the data determine, by shared precision, (length of the prior,)."""
        if self._by_logs is not None:
            share = self._by_logs.weights * self._log_signals().sigmoid()
            by_group = share.new_zeros(len(self.prior.layouts))
            by_group = by_group.index_add(0, self._by_logs.group, share)
            return by_group.sum().reshape(1) if self.prior.sharing == "scalar" else by_group
        found = {name: normal.effective_dimensions() for name, normal in self.blocks.items()}
        return self._shared(self.prior.pack(found["full"][0, 0]) if "full" in found else found)

    def without_data(self) -> "Posterior":
        """The prior as a posterior of no data: T = ∞ leaves nothing of the curvature."""
        hyper = self.hyperparameters.detached()
        return self.at(replace(hyper, temperature=torch.full_like(hyper.temperature, torch.inf)))

    def with_ggn(self, ggn: GGN) -> "Posterior":
        """The same mode and hyperparameters with the curvature of other data."""
        hyper = self.hyperparameters.detached()
        return replace(self, ggn=ggn, hyperparameters=hyper, _kept={})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The mode in the model's own precision."""
        live = self.network.parameters(tuple(self.mode))
        return {name: value.to(live[name].dtype) for name, value in self.mode.items()}

    def deviations(
        self, n: int, generator: Generator, kept: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Draws of θ − θ* by parameter name, shape (n, *shape), float64.

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
        if "full" in colours:
            return self.prior.by_parameter(colours["full"][:, 0, 0])
        return self.prior.by_parameter(self.prior.flatten(colours))

    @property
    def device(self) -> torch.device:
        """Device of the mode and the blocks."""
        return next(iter(self.mode.values())).device
