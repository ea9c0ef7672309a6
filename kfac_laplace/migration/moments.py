"""What laplace-torch says of its Gaussian in vectors and matrices over all parameters."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.posterior.gaussian import Posterior


def mean(posterior: Posterior) -> Tensor:
    """θ* as a vector (P,) of all entries inside the posterior, float64."""
    layouts = posterior.prior.layouts
    return layouts.flatten(layouts.pack(posterior.mode))


def drawn_mean(posterior: Posterior) -> Tensor:
    """The mean of the vectors that are drawn: θ*, and what is not random around a subnetwork."""
    return torch.cat([value.flatten() for value in posterior.drawn.values()])


def prior_diagonal(posterior: Posterior) -> Tensor:
    """The diagonal (P,) of P₀."""
    layouts = posterior.prior.layouts
    by_group = posterior.prior.by_group(posterior.hyperparameters.prior_precision)
    return layouts.flatten(
        {name: by_group[name].expand(la.matrix) for name, la in layouts.groups.items()}
    )


def precision(posterior: Posterior) -> Tensor:
    """P = H/(σ²T) + P₀: a vector (P,) for "diag", a matrix (P, P) for "full".

    Raises:
        UnsupportedUse: Kronecker factors, or few directions, of which no matrix is made.
    """
    found, prior = curvature(posterior, "posterior_precision"), prior_diagonal(posterior)
    return posterior.scale * found + (prior if found.ndim == 1 else prior.diag())


def curvature(posterior: Posterior, where: str) -> Tensor:
    """H at σ = T = 1: a vector (P,) for "diag", a matrix (P, P) for "full", float64.

    Args:
        posterior: the posterior.
        where: what was asked for, for the error.

    Raises:
        UnsupportedUse: Kronecker factors, or few directions, of which no matrix is made.
    """
    structure = posterior.ggn.options.structure
    if structure == "full":
        return posterior.expansion.dense
    if structure == "diag":
        blocks, device = posterior.ggn.blocks, posterior.device
        values = {name: block.factors.to(device) for name, block in blocks.items()}
        return posterior.prior.layouts.flatten(values).double()
    if structure == "lowrank":
        raise UnsupportedUse(
            "a posterior in few directions makes no matrix of its precision",
            where=where,
            got="hessian_structure='lowrank'",
            remedy="Take curvature.blocks['lowrank'].rows, R with H = RᵀR at σ = T = 1, "
            "prior_precision_diag, log_det_posterior_precision, square_norm or "
            "functional_covariance",
        )
    raise UnsupportedUse(
        "a posterior in Kronecker factors makes no matrix of its precision",
        where=where,
        got=f"hessian_structure='{structure}'",
        remedy="Take curvature.blocks[name].factors or .dense(), which are H at σ = T = 1, "
        "prior_precision_diag, log_det_posterior_precision, square_norm or functional_covariance",
    )


def square_norm(posterior: Posterior, value: Tensor) -> Tensor:
    """(value − θ*)ᵀ P (value − θ*), shape ()."""
    centre = mean(posterior)
    if not isinstance(value, Tensor) or value.shape != centre.shape:
        raise InvalidValue(
            "not one number for each parameter",
            where="value",
            got=tuple(value.shape) if isinstance(value, Tensor) else repr(value),
            remedy=f"Pass a vector of {len(centre)}, in the order of parameters_to_vector",
        )
    away = _by_block(posterior, value.to(centre) - centre)
    norms = [normal.squared_norm(away[name]) for name, normal in posterior.blocks.items()]
    return torch.stack(norms).sum()


def log_prob(posterior: Posterior, value: Tensor, normalized: bool) -> Tensor:
    """log N(value; θ*, P⁻¹), or its part that depends on the value."""
    quadratic = -0.5 * square_norm(posterior, value)
    if not normalized:
        return quadratic
    constant = posterior.log_det_posterior_precision - len(mean(posterior)) * math.log(2 * math.pi)
    return quadratic + 0.5 * constant


def features(posterior: Posterior, jacobians: Tensor) -> Tensor:
    """φ (..., k) with φ φᵀ = J P⁻¹ Jᵀ, float64, for rows J (..., P)."""
    size = posterior.prior.layouts.size
    if not isinstance(jacobians, Tensor) or jacobians.ndim != 3 or jacobians.shape[-1] != size:
        raise InvalidType(
            "not Jacobians of outputs with respect to all parameters",
            where="Js",
            got=tuple(getattr(jacobians, "shape", ())) or repr(jacobians),
            remedy=f"Pass (examples, outputs, {size}), or inputs to la.predict(x).covariance",
        )
    rows = _by_block(posterior, jacobians.to(mean(posterior)))
    return torch.cat([normal.features(rows[name]) for name, normal in posterior.blocks.items()], -1)


def _by_block(posterior: Posterior, vectors: Tensor) -> Mapping[str, Tensor]:
    """Vectors (..., P) as matrices (..., b, o, i) by block."""
    if (whole := posterior.ggn.options.one_block) is not None:
        return {whole: vectors[..., None, None, :]}
    return posterior.prior.layouts.pack_vector(vectors)


def outputs_of_a_row(posterior: Posterior) -> int:
    """c of outputs (N, c).

    Raises:
        UnsupportedUse: outputs have positions as well.
    """
    ggn = posterior.ggn
    if ggn.knowledge.axis is not None:
        raise UnsupportedUse(
            "outputs have more axes than examples and classes",
            where="n_outputs",
            remedy="Look at model(x).shape, or at curvature.n_outputs for the number of all",
        )
    return round(ggn.n_outputs / ggn.n_rows)
