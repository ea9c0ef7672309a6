"""Lines of the pages that laplace-torch's package includes, and of its `marglik_training`."""

from __future__ import annotations

from typing import Any

import torch
from laplace.curvature import BackPackGGN
from peers import peer
from peers.lines.front import fitted_heads
from peers.lines.table import (
    SINGLE,
    Texts,
    adapted,
    classes,
    curve,
    line,
    preferences,
    texts,
)

CURVE, WIDE, HUB = "regression", "calibration", "Hugging Face"
PAIRS, TRAINING = "reward modelling", "marglik_training"

# --- regression ----------------------------------------------------------------------------------


def full(lib: Any) -> Any:
    model, loader, x = curve()
    la = lib.Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    la.fit(loader)
    return la, x


@line(
    CURVE,
    'Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")',
    same="values",
)
def full_regression(lib: Any) -> Any:
    return full(lib)[0].log_marginal_likelihood().squeeze()


def tuned(lib: Any) -> Any:
    la, x = full(lib)
    log_prior, log_sigma = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (-la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())).backward()
        optimizer.step()
    return la, x, log_prior, log_sigma


@line(
    CURVE,
    "neg_marglik = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp()), "
    "neg_marglik.backward() and Adam on both",
    same="values",
)
def adam_on_the_evidence(lib: Any) -> Any:
    _, _, log_prior, log_sigma = tuned(lib)
    return log_prior.detach(), log_sigma.detach()


@line(CURVE, "f_mu, f_var = la(X_test)", same="values", rtol=SINGLE)
def mean_and_variance(lib: Any) -> Any:
    la, x = full(lib)
    f_mu, f_var = la(x)
    return f_mu, f_var


@line(
    CURVE,
    "f_mu.squeeze().detach().cpu().numpy(), f_var.squeeze().sqrt().cpu().numpy()",
    same="values",
    rtol=SINGLE,
)
def as_numpy(lib: Any) -> Any:
    la, x = full(lib)
    f_mu, f_var = la(x)
    arrays = f_mu.squeeze().detach().cpu().numpy(), f_var.squeeze().sqrt().cpu().numpy()
    return torch.tensor(arrays[0] + arrays[1])


@line(CURVE, "la.sigma_noise.item()", same="values")
def noise(lib: Any) -> Any:
    return torch.tensor(tuned(lib)[0].sigma_noise.item(), dtype=torch.float32)


@line(CURVE, "la.prior_precision.item(), after the evidence at one value", but=RuntimeError)
def one_precision(lib: Any) -> Any:
    return torch.tensor(tuned(lib)[0].prior_precision.item())


def trained(lib: Any, **options: Any) -> Any:
    model, loader, x = curve()
    la, model, margliks, losses = lib.marglik_training(
        model=model,
        train_loader=loader,
        likelihood="regression",
        hessian_structure="full",
        n_epochs=3,
        optimizer_kwargs={"lr": 1e-2},
        prior_structure="scalar",
        **options,
    )
    assert len(losses) == 3 and margliks
    return la, x


@line(
    CURVE,
    'marglik_training(model=model, train_loader=train_loader, likelihood="regression", '
    'hessian_structure="full", backend=BackPackGGN, n_epochs=…, optimizer_kwargs={"lr": 1e-2}, '
    'prior_structure="scalar")',
    says=r"backend: .*fisher=",
)
def training_by_a_backend(lib: Any) -> Any:
    return trained(lib, backend=BackPackGGN)[0].prior_precision


@line(CURVE, "marglik_training(…) as above without its backend; f_mu, f_var = la(X_test)")
def training(lib: Any) -> Any:
    la, x = trained(lib)
    return la(x)


@line(CURVE, "la.prior_precision.numpy(), after marglik_training")
def precision_as_numpy(lib: Any) -> Any:
    return torch.tensor(trained(lib)[0].prior_precision.numpy())


# --- calibration ---------------------------------------------------------------------------------


def head(lib: Any) -> Any:
    model, loader, x = classes()
    la = lib.Laplace(
        model.eval(), "classification", subset_of_weights="last_layer", hessian_structure="kron"
    )
    la.fit(loader)
    return la, x


@line(
    WIDE,
    'Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="kron")',
    same="values",
)
def kronecker_head(lib: Any) -> Any:
    la, x = head(lib)
    return la(x, link_approx="probit")


@line(WIDE, 'la.optimize_prior_precision(method="marglik")')
def by_the_evidence(lib: Any) -> Any:
    la, _ = head(lib)
    la.optimize_prior_precision(method="marglik")
    return la.log_marginal_likelihood().squeeze()


@line(WIDE, "la(x) under torch.no_grad(), torch.cat(…).cpu().numpy(), Categorical(probs=…)")
def under_no_grad(lib: Any) -> Any:
    la, x = head(lib)
    with torch.no_grad():
        found = torch.cat([la(x), la(x)])
    assert found.cpu().numpy().shape == (8, 3)
    return torch.distributions.Categorical(found).log_prob(torch.zeros(8, dtype=torch.long))


# --- Hugging Face --------------------------------------------------------------------------------


@line(
    HUB,
    'Laplace(model, likelihood="classification", subset_of_weights="last_layer", '
    'hessian_structure="full", feature_reduction="pick_last")',
    says=r"feature_reduction: .*Leave it out",
)
def reduced_features(lib: Any) -> Any:
    return lib.Laplace(
        peer.seeded(Texts).eval(),
        likelihood="classification",
        subset_of_weights="last_layer",
        hessian_structure="full",
        feature_reduction="pick_last",
    )


@line(HUB, "la.optimize_prior_precision(); la(X_test).shape")
def shape_of_a_prediction(lib: Any) -> Any:
    la = fitted_heads(lib)
    la.optimize_prior_precision()
    return tuple(la(next(iter(texts()))).shape)


@line(
    HUB,
    'Laplace(lora_model, likelihood="classification", subset_of_weights="all", '
    'hessian_structure="kron"); lora_la.fit(dataloader); lora_la(X_test)',
)
def adapters(lib: Any) -> Any:
    la = lib.Laplace(
        adapted(),
        likelihood="classification",
        subset_of_weights="all",
        hessian_structure="kron",
    )
    la.fit(texts())
    return la(next(iter(texts())))


# --- reward modelling ----------------------------------------------------------------------------


def rewards(lib: Any) -> Any:
    model, loader, x = preferences()
    la = lib.Laplace(model.eval(), likelihood="reward_modeling", subset_of_weights="all")
    la.fit(loader)
    return la, x


@line(PAIRS, 'Laplace(reward_model, likelihood="reward_modeling", subset_of_weights="all")')
def bradley_terry(lib: Any) -> Any:
    model, _, _ = preferences()
    lib.Laplace(model.eval(), likelihood="reward_modeling", subset_of_weights="all")


@line(PAIRS, "la.fit(tensor_dataloader), of pairs")
def fit_of_pairs(lib: Any) -> Any:
    return rewards(lib)[0].n_data


@line(PAIRS, "la.optimize_prior_precision(), of pairs")
def prior_of_rewards(lib: Any) -> Any:
    la, _ = rewards(lib)
    la.optimize_prior_precision()
    return la.log_marginal_likelihood().squeeze()


@line(PAIRS, "pred_mean, pred_var = la(x_test), of single inputs")
def rewards_of_inputs(lib: Any) -> Any:
    la, x = rewards(lib)
    pred_mean, pred_var = la(x)
    return pred_mean, pred_var


# --- reference of marglik_training ---------------------------------------------------------------


@line(
    TRAINING,
    "marglik_training(model, train_loader, likelihood, hessian_structure, optimizer_cls=, "
    "optimizer_kwargs=, scheduler_cls=, scheduler_kwargs=, n_epochs=, lr_hyp=, prior_structure=, "
    "n_epochs_burnin=, n_hypersteps=, marglik_frequency=, prior_prec_init=, sigma_noise_init=, "
    "temperature=, fix_sigma_noise=, progress_bar=)",
)
def every_option(lib: Any) -> Any:
    model, loader, x = curve()
    la, _, margliks, losses = lib.marglik_training(
        model,
        loader,
        "regression",
        "kron",
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs={"lr": 1e-3},
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
        scheduler_kwargs={"T_max": 4},
        n_epochs=4,
        lr_hyp=0.05,
        prior_structure="scalar",
        n_epochs_burnin=1,
        n_hypersteps=2,
        marglik_frequency=2,
        prior_prec_init=0.5,
        sigma_noise_init=0.8,
        temperature=1.0,
        fix_sigma_noise=True,
        progress_bar=False,
    )
    assert len(losses) == 4 and margliks and la.sigma_noise == 0.8
    return la(x)


@line(
    TRAINING,
    "marglik_training(…, enable_backprop=True)",
    says=r"enable_backprop: .*la\(x, enable_backprop=True\)",
)
def training_with_gradients(lib: Any) -> Any:
    return trained(lib, enable_backprop=True)


@line(
    TRAINING,
    'marglik_training(…, dict_key_x="input_ids", dict_key_y="labels")',
    says="dict_key_x: .*Leave it out",
)
def training_on_mappings(lib: Any) -> Any:
    return trained(lib, dict_key_x="input_ids", dict_key_y="labels")
