"""Lines of laplace-torch's pages on posteriors over functions and on continual learning."""

from __future__ import annotations

from typing import Any

import torch
from laplace.curvature import AsdlGGN
from peers import peer
from peers.lines.table import classes, curve, line, preferences

PROCESS, ELLA, VALLA, TASKS = "Gaussian processes", "ELLA", "VaLLA", "continual learning"

# --- Gaussian processes, ELLA, VaLLA -------------------------------------------------------------


def functional(lib: Any, likelihood: str = "classification", **options: Any) -> Any:
    model = (classes if likelihood == "classification" else curve)()[0]
    return lib.Laplace(
        model, likelihood, subset_of_weights="all", hessian_structure="gp", **options
    )


FUNCTIONAL = r"hessian_structure: .*'gp'.*hessian_structure=LowRank"


@line(
    PROCESS,
    'Laplace(model, "classification", subset_of_weights="all", hessian_structure="gp", '
    "independent_outputs=True, n_subset=m, prior_precision=prior_precision)",
    says=FUNCTIONAL,
)
def process(lib: Any) -> Any:
    return functional(lib, independent_outputs=True, n_subset=9, prior_precision=2.0)


@line(
    ELLA,
    'Laplace(model, "classification", subset_of_weights="all", hessian_structure="gp", '
    'functional_approximation="nystrom", subsample_size=100, n_eigenvalues=20)',
    says=FUNCTIONAL,
)
def nystrom(lib: Any) -> Any:
    return functional(lib, functional_approximation="nystrom", subsample_size=9, n_eigenvalues=3)


def functions(lib: Any) -> Any:
    """Their posterior over functions, and what is here of it."""
    model, loader, x = curve()
    if lib.Laplace is peer.laplace.Laplace:
        nystrom = {"functional_approximation": "nystrom", "subsample_size": 9, "n_eigenvalues": 3}
        la = functional(lib, "regression", **nystrom)
    else:
        la = lib.Laplace(model, "regression")
    la.fit(loader)
    return la, x


@line(ELLA, "logits, covariance = ella.predictive_moments(x)")
def moments_of_outputs(lib: Any) -> Any:
    la, x = functions(lib)
    logits, covariance = la.predictive_moments(x)
    return logits, covariance


@line(ELLA, "ella.predictive_moments(x, joint=True)")
def joint_moments(lib: Any) -> Any:
    la, x = functions(lib)
    return la.predictive_moments(x, joint=True)


@line(ELLA, 'ella.optimize_prior_precision(method="gridsearch", val_loader=…)')
def grid_search_alone(lib: Any) -> Any:
    model, loader, _ = classes()
    la = lib.Laplace(model, "classification")
    la.fit(loader)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader)
    return la.prior_precision.max()


@line(ELLA, "ella(pair_inputs, fitting=True)", says=r"fitting: .*predict\(x\)\.probs")
def preferences_of_pairs(lib: Any) -> Any:
    model, loader, _ = preferences()
    la = lib.Laplace(model, "reward_modeling", subset_of_weights="all")
    la.fit(loader)
    return la(next(iter(loader))[0], fitting=True)


@line(ELLA, "ella.functional_samples(x, joint=True)", says="joint: .*Leave it out")
def joint_functions(lib: Any) -> Any:
    la, x = functions(lib)
    return la.functional_samples(x, joint=True)


@line(ELLA, "ella.fit_history_", but=AttributeError)
def history(lib: Any) -> Any:
    return functions(lib)[0].fit_history_


@line(
    VALLA,
    'Laplace(model, "regression", subset_of_weights="all", hessian_structure="gp", '
    'functional_approximation="variational", inducing_locations="random", num_inducing=32, '
    "sigma_noise=0.1, alpha=1.0)",
    says=FUNCTIONAL,
)
def variational(lib: Any) -> Any:
    return functional(
        lib,
        "regression",
        functional_approximation="variational",
        inducing_locations="random",
        num_inducing=4,
        sigma_noise=0.1,
        alpha=1.0,
    )


@line(
    VALLA,
    "valla.fit(train_loader, iterations=100, lr=1e-3)",
    says=r"iterations: .*one pass.*optimize_prior",
)
def iterations(lib: Any) -> Any:
    model, loader, _ = curve()
    lib.Laplace(model, "regression").fit(loader, iterations=3, lr=1e-3)


# --- continual learning --------------------------------------------------------------------------


def task(lib: Any, **options: Any) -> Any:
    model, loader, _ = classes()
    la = lib.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="diag", **options
    )
    la.fit(loader, override=False)
    return la, loader


@line(
    TASKS,
    'Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag", '
    "prior_precision=1e-4, backend=AsdlGGN)",
    says=r"backend: .*fisher=",
)
def task_by_a_backend(lib: Any) -> Any:
    return task(lib, prior_precision=1e-4, backend=AsdlGGN)[0].n_params


@line(TASKS, "la.fit(train_loader, override=False)", same="values")
def another_task(lib: Any) -> Any:
    la, loader = task(lib)
    la.fit(loader, override=False)
    return la.log_marginal_likelihood().squeeze()


@line(TASKS, "la.H.clone(), before the first task", says="Call fit first")
def curvature_of_nothing(lib: Any) -> Any:
    model, _, _ = classes()
    la = lib.Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag")
    return la.H.clone()


@line(TASKS, "la.H.clone(), after a task", same="values")
def curvature(lib: Any) -> Any:
    return task(lib)[0].H.clone()


@line(TASKS, "la.log_prob(parameters_to_vector(model.parameters())) in a loss", same="values")
def log_prob(lib: Any) -> Any:
    la, _ = task(lib)
    mean = torch.nn.utils.parameters_to_vector(la.model.parameters()) + 0.1
    return la.log_prob(mean).detach()


def after_another(lib: Any, **options: Any) -> Any:
    la, loader = task(lib)
    hyper_la = lib.Laplace(
        peer.mlp(),
        "classification",
        subset_of_weights="all",
        hessian_structure="diag",
        prior_mean=la.mean,
        prior_precision=la.posterior_precision,
        **options,
    )
    hyper_la.fit(loader)
    return hyper_la, la


@line(
    TASKS,
    'Laplace(model, "classification", …, prior_mean=la.mean, '
    "prior_precision=la.posterior_precision)",
    says=r"prior_precision: .*prior_structure='diag'",
)
def the_last_posterior_as_prior(lib: Any) -> Any:
    return after_another(lib)


@line(
    TASKS,
    "hyper_la.log_marginal_likelihood(prior_prec), of a vector (P,)",
    says=r"prior_precision: .*prior_structure='diag'",
)
def evidence_at_a_vector(lib: Any) -> Any:
    la, _ = task(lib)
    return la.log_marginal_likelihood(la.H + torch.tensor([1e-2], dtype=torch.float64))


@line(TASKS, "la.prior_precision = torch.exp(log_prior_prec).clone().detach()", same="values")
def set_prior(lib: Any) -> Any:
    la, _ = task(lib)
    la.prior_precision = torch.exp(torch.ones(1, dtype=torch.float64)).clone().detach()
    return la.log_marginal_likelihood().squeeze()
