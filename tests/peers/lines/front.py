"""Lines of laplace-torch's README and of the front page of its documentation."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from laplace.curvature import AsdlGGN
from peers import peer
from peers.lines.table import (
    Texts,
    adapted,
    classes,
    curve,
    line,
    texts,
    top_alone,
)

README, START = "README", "front page"


# --- README --------------------------------------------------------------------------------------


@line(README, 'Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag")')
def flavour(lib: Any) -> Any:
    model, _, _ = classes()
    return lib.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="diag"
    ).prior_precision.shape.numel()


def diagonal(lib: Any) -> Any:
    model, loader, x = classes()
    la = lib.Laplace(model, "classification", subset_of_weights="all", hessian_structure="diag")
    la.fit(loader)
    return la, loader, x


@line(README, "la.fit(train_loader)", same="values")
def fit(lib: Any) -> Any:
    return diagonal(lib)[0].log_marginal_likelihood().squeeze()


@line(
    README,
    'la.optimize_prior_precision(method="gridsearch", pred_type="glm", link_approx="probit", '
    "val_loader=val_loader)",
)
def grid_search(lib: Any) -> Any:
    la, loader, _ = diagonal(lib)
    la.optimize_prior_precision(
        method="gridsearch", pred_type="glm", link_approx="probit", val_loader=loader
    )
    return la.prior_precision.max()


@line(README, 'la(x, pred_type="glm", link_approx="probit")', same="values")
def probit(lib: Any) -> Any:
    la, _, x = diagonal(lib)
    return la(x, pred_type="glm", link_approx="probit")


# --- the front page of the documentation ---------------------------------------------------------


def default(lib: Any) -> Any:
    model, loader, _ = curve()
    la = lib.Laplace(model, likelihood="regression")
    la.fit(loader)
    return la


@line(START, 'Laplace(model, likelihood="regression")', same="values")
def all_defaults(lib: Any) -> Any:
    return default(lib).log_marginal_likelihood().squeeze()


@line(START, "la.log_marginal_likelihood(prior_prec, obs_noise)", same="values")
def evidence(lib: Any) -> Any:
    return default(lib).log_marginal_likelihood(torch.tensor(2.0), torch.tensor(0.4)).squeeze()


@line(START, "ml.backward()", same="values")
def gradient_of_the_prior(lib: Any) -> Any:
    delta, sigma = (torch.tensor(v, requires_grad=True) for v in (2.0, 0.4))
    default(lib).log_marginal_likelihood(delta, sigma).backward()
    assert sigma.grad is not None
    return delta.grad


def heads(lib: Any) -> Any:
    model = top_alone(peer.seeded(Texts)).eval()
    return lib.Laplace(
        model,
        likelihood="classification",
        subset_of_weights="all",
        hessian_structure="diag",
    )


def fitted_heads(lib: Any) -> Any:
    la = heads(lib)
    la.fit(texts())
    return la


@line(
    START,
    'Laplace(model, likelihood="classification", subset_of_weights="all", '
    'hessian_structure="diag"), gradients of the body off',
)
def gradients_off(lib: Any) -> Any:
    return fitted_heads(lib).n_params


@line(
    START,
    "la.fit(dataloader), which yields mappings, to a model of the whole mapping",
    same="values",
)
def fit_of_mappings(lib: Any) -> Any:
    return fitted_heads(lib).log_marginal_likelihood().squeeze()


@line(START, "la.optimize_prior_precision()")
def no_argument(lib: Any) -> Any:
    la = fitted_heads(lib)
    la.optimize_prior_precision()
    return la.log_marginal_likelihood().squeeze()


@line(START, "la(test_data), a mapping with its labels")
def prediction_of_a_mapping(lib: Any) -> Any:
    return fitted_heads(lib)(next(iter(texts())))


@line(
    START,
    'Laplace(lora_model, likelihood="classification", subset_of_weights="all", '
    'hessian_structure="diag", backend=AsdlGGN)',
    says=r"backend: .*fisher=",
)
def adapters_by_a_backend(lib: Any) -> Any:
    return lib.Laplace(
        adapted(),
        likelihood="classification",
        subset_of_weights="all",
        hessian_structure="diag",
        backend=AsdlGGN,
    )


@line(START, "lora_la(test_data) before fit", says="Call fit first")
def prediction_of_the_prior(lib: Any) -> Any:
    return heads(lib)(next(iter(texts())))


@line(START, "LargestMagnitudeSubnetMask(model, n_params_subnet=128)")
def largest(lib: Any) -> Any:
    return lib.masks.LargestMagnitudeSubnetMask(classes()[0], n_params_subnet=9) is None


@line(START, "subnetwork_indices = subnetwork_mask.select()", same="values")
def selected(lib: Any) -> Any:
    return lib.masks.LargestMagnitudeSubnetMask(classes()[0], n_params_subnet=9).select()


@line(START, 'ModuleNameSubnetMask(model, module_names=["layer.1", "layer.3"])')
def by_module(lib: Any) -> Any:
    return lib.masks.ModuleNameSubnetMask(classes()[0], module_names=["0", "2"]) is None


@line(START, "subnetwork_mask.select(); subnetwork_mask.indices", same="values")
def indices_of_a_mask(lib: Any) -> Any:
    mask = lib.masks.ModuleNameSubnetMask(classes()[0], module_names=["2"])
    mask.select()
    return mask.indices


@line(
    START,
    'Laplace(model, "classification", subset_of_weights="subnetwork", hessian_structure="full", '
    "subnetwork_indices=torch.tensor([0, 4, 11, …]))",
    same="values",
)
def subnetwork(lib: Any) -> Any:
    model, loader, _ = classes()
    la = lib.Laplace(
        model,
        "classification",
        subset_of_weights="subnetwork",
        hessian_structure="full",
        subnetwork_indices=torch.tensor([0, 4, 11, 42]),
    )
    la.fit(loader)
    return la.posterior_precision


@line(START, "Laplace(…, subset_of_weights='last_layer', …)", same="values")
def last_layer(lib: Any) -> Any:
    model, loader, _ = classes()
    la = lib.Laplace(model, "classification", subset_of_weights="last_layer")
    la.fit(loader)
    return la.log_marginal_likelihood().squeeze()


@line(START, 'torch.save(la.state_dict(), "la_state_dict.bin")')
def state_saved(lib: Any) -> Any:
    torch.save(diagonal(lib)[0].state_dict(), io.BytesIO())


@line(
    START,
    'la2 = Laplace(model2, "classification", subset_of_weights="all", hessian_structure="diag"); '
    'la2.load_state_dict(torch.load("la_state_dict.bin"))',
)
def state_loaded(lib: Any) -> Any:
    la, _, x = diagonal(lib)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    again = lib.Laplace(
        classes()[0], "classification", subset_of_weights="all", hessian_structure="diag"
    )
    # Their state holds enumerations, which torch.load no longer takes without being told.
    again.load_state_dict(torch.load(file, weights_only=lib.Laplace is not peer.laplace.Laplace))
    assert torch.equal(again(x, link_approx="probit"), la(x, link_approx="probit"))
    return again(x)


def whole(lib: Any) -> Any:
    la, _, x = diagonal(lib)
    file = io.BytesIO()
    torch.save(la, file)
    file.seek(0)
    return la, file, x


@line(START, 'torch.save(la, "la.pt")')
def object_saved(lib: Any) -> Any:
    whole(lib)


@line(START, 'torch.load("la.pt")', but=pickle.UnpicklingError)
def object_loaded(lib: Any) -> Any:
    return torch.load(whole(lib)[1])


@line(START, 'torch.load("la.pt", weights_only=False, map_location="cpu")')
def object_loaded_as_torch_wants_it(lib: Any) -> Any:
    la, file, x = whole(lib)
    again = torch.load(file, weights_only=False, map_location="cpu")
    assert torch.equal(again(x, link_approx="probit"), la(x, link_approx="probit"))
    return again(x)
