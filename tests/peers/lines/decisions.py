"""Lines of laplace-torch's pages on expectations, Bayesian optimisation, language models."""

from __future__ import annotations

from typing import Any

import torch
from laplace import HessianStructure, Likelihood, LinkApprox, PredType, SubsetOfWeights
from laplace.curvature import AsdlEF, AsdlGGN
from peers import peer
from peers.lines.table import curve, line, tokens

DRAWS, SEARCH, LANGUAGE = "expectations", "Bayesian optimisation", "language models"

# --- expectations of functions -------------------------------------------------------------------


@line(
    DRAWS,
    "Laplace(model, Likelihood.REGRESSION, subset_of_weights=SubsetOfWeights.ALL, "
    "hessian_structure=HessianStructure.KRON, enable_backprop=True)",
    says=r"enable_backprop: .*la\(x, enable_backprop=True\)",
)
def words_as_members(lib: Any) -> Any:
    return lib.Laplace(
        curve()[0],
        Likelihood.REGRESSION,
        subset_of_weights=SubsetOfWeights.ALL,
        hessian_structure=HessianStructure.KRON,
        enable_backprop=True,
    )


def by_members(lib: Any) -> Any:
    model, loader, x = curve()
    la = lib.Laplace(
        model,
        Likelihood.REGRESSION,
        subset_of_weights=SubsetOfWeights.ALL,
        hessian_structure=HessianStructure.KRON,
    )
    la.fit(loader)
    return la, x


@line(
    DRAWS,
    "Laplace(model, Likelihood.REGRESSION, subset_of_weights=SubsetOfWeights.ALL, "
    "hessian_structure=HessianStructure.KRON)",
    same="values",
)
def members_alone(lib: Any) -> Any:
    return by_members(lib)[0].log_marginal_likelihood().squeeze()


@line(DRAWS, "la.optimize_prior_precision(PredType.GLM)")
def first_argument(lib: Any) -> Any:
    la, _ = by_members(lib)
    la.optimize_prior_precision(PredType.GLM)
    return la.log_marginal_likelihood().squeeze()


@line(DRAWS, "la.functional_samples(x_test, n_samples=1)")
def one_function(lib: Any) -> Any:
    la, x = by_members(lib)
    return la.functional_samples(x, n_samples=1)


@line(DRAWS, "la.functional_samples(x_test, pred_type=PredType.GLM, n_samples=10)")
def linearised_functions(lib: Any) -> Any:
    la, x = by_members(lib)
    return la.functional_samples(x, pred_type=PredType.GLM, n_samples=10)


@line(DRAWS, "la.functional_samples(x_test, pred_type=PredType.NN, n_samples=10)")
def networks(lib: Any) -> Any:
    la, x = by_members(lib)
    return la.functional_samples(x, pred_type=PredType.NN, n_samples=10)


@line(
    DRAWS,
    "autograd.grad(f_sample.sum(), x_test)[0], of functional_samples without more",
    says="enable_backprop=True",
    but=RuntimeError,
)
def thompson(lib: Any) -> Any:
    la, x = by_members(lib)
    x.requires_grad_()
    f_sample = la.functional_samples(x, pred_type=PredType.GLM, n_samples=1).squeeze(0)
    return torch.autograd.grad(f_sample.sum(), x)[0]


@line(
    DRAWS,
    "Laplace(…, hessian_structure=HessianStructure.GP)",
    says=r"hessian_structure: .*'gp'.*hessian_structure=LowRank",
)
def process_by_a_member(lib: Any) -> Any:
    model, _, _ = curve()
    return lib.Laplace(
        model,
        Likelihood.REGRESSION,
        subset_of_weights=SubsetOfWeights.ALL,
        hessian_structure=HessianStructure.GP,
    )


# --- Bayesian optimisation -----------------------------------------------------------------------


def surrogate(lib: Any) -> Any:
    model, loader, x = curve()
    la = lib.Laplace(model, "regression", subset_of_weights="all", hessian_structure="kron")
    la.fit(loader)
    return la, x


@line(
    SEARCH,
    'Laplace(nn, likelihood, subset_of_weights="all", hessian_structure="kron", '
    "enable_backprop=True)",
    says=r"enable_backprop: .*la\(x, enable_backprop=True\)",
)
def surrogate_with_gradients(lib: Any) -> Any:
    model, _, _ = curve()
    return lib.Laplace(
        model,
        "regression",
        subset_of_weights="all",
        hessian_structure="kron",
        enable_backprop=True,
    )


@line(SEARCH, "la.optimize_prior_precision(n_steps=50)")
def so_many_steps(lib: Any) -> Any:
    la, _ = surrogate(lib)
    la.optimize_prior_precision(n_steps=50)
    return la.log_marginal_likelihood().squeeze()


@line(SEARCH, "mean_y, cov_y = la(test_x, joint=True)", same="values")
def jointly(lib: Any) -> Any:
    la, x = surrogate(lib)
    mean_y, cov_y = la(x, joint=True)
    return mean_y, cov_y


@line(SEARCH, "la(x_batch, joint=False); torch.cat(cov_y, dim=0).squeeze()", same="values")
def one_by_one(lib: Any) -> Any:
    la, x = surrogate(lib)
    pairs = [la(x_batch, joint=False) for x_batch in x.split(3)]
    means, spreads = zip(*pairs, strict=True)
    return torch.cat(means, dim=0).squeeze(), torch.cat(spreads, dim=0).squeeze()


# --- language models -----------------------------------------------------------------------------


def positions(lib: Any, structure: str = "full", batch_first: bool = True) -> Any:
    model, loader = tokens(batch_first)
    theirs = {"dict_key_x": "input", "backend": AsdlGGN}
    la = lib.Laplace(
        model,
        "regression",
        hessian_structure=structure,
        subset_of_weights="all",
        dict_key_y="output",
        **(theirs if lib.Laplace is peer.laplace.Laplace else {}),
    )
    la.fit(loader)
    return la, next(iter(loader))


@line(
    LANGUAGE,
    'Laplace(model, "regression", hessian_structure="full", subset_of_weights="all", '
    "backend=AsdlEF, dict_key_x=INPUT_KEY, dict_key_y=OUTPUT_KEY, enable_backprop=False)",
    says=r"backend: .*fisher='empirical'",
)
def keys_of_mappings(lib: Any) -> Any:
    return lib.Laplace(
        tokens()[0],
        "regression",
        hessian_structure="full",
        subset_of_weights="all",
        backend=AsdlEF,
        dict_key_x="input",
        dict_key_y="output",
        enable_backprop=False,
    )


@line(
    LANGUAGE,
    'Laplace(model, "regression", …, dict_key_x=INPUT_KEY, dict_key_y=OUTPUT_KEY)',
    says=r"dict_key_x: .*Leave it out",
)
def keys_without_a_backend(lib: Any) -> Any:
    return lib.Laplace(
        tokens()[0],
        "regression",
        hessian_structure="diag",
        subset_of_weights="all",
        dict_key_x="input",
        dict_key_y="output",
    )


@line(LANGUAGE, "la.fit(dl), of their model", says="attention over the batch")
def attention_over_the_batch(lib: Any) -> Any:
    positions(lib, batch_first=False)


@line(LANGUAGE, "la(data, pred_type=PredType.GLM), of outputs (B, L, K)", same="")
def of_positions(lib: Any) -> Any:
    la, data = positions(lib)
    pred_la_mean, pred_la_var = la(data, pred_type=PredType.GLM)
    assert pred_la_mean.shape == (4, 3, 2) and pred_la_var.shape == (4, 3, 2, 2)


@line(
    LANGUAGE,
    "la(data, pred_type=PredType.GLM, diagonal_output=True)",
    says=r"diagonal_output: .*predict\(x\)\.covariance",
)
def diagonal_of_positions(lib: Any) -> Any:
    la, data = positions(lib)
    return la(data, pred_type=PredType.GLM, diagonal_output=True)


@line(
    LANGUAGE,
    "la(data, pred_type=PredType.NN, link_approx=LinkApprox.MC, n_samples=10)",
    apart="the covariance of the outputs at a position, where theirs is their variances",
)
def sampled_positions(lib: Any) -> Any:
    la, data = positions(lib, "diag")
    pred_la_mean, pred_la_var = la(
        data, pred_type=PredType.NN, link_approx=LinkApprox.MC, n_samples=10
    )
    return pred_la_mean, pred_la_var
