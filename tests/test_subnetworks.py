"""Masks that choose subnetworks: what they choose by definition, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from cases import build
from torch.nn.utils import parameters_to_vector

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.subnetworks import (
    LargestMagnitudeSubnetMask,
    LargestVarianceDiagLaplaceSubnetMask,
    LastLayerSubnetMask,
    ModuleNameSubnetMask,
    ParamNameSubnetMask,
    RandomSubnetMask,
)


def test_frozen_entries_are_left_out():
    model = build("mlp-tanh").model
    model[2].requires_grad_(False)
    free = model[0].weight.numel() + model[0].bias.numel()
    theta = parameters_to_vector(model.parameters()).detach()
    chosen = LargestMagnitudeSubnetMask(model, 7).select()
    assert torch.equal(chosen, theta[:free].abs().topk(7).indices.sort().values)
    assert int(RandomSubnetMask(model, free).select().max()) == free - 1
    with pytest.raises(InvalidValue, match=f"has {free} trainable"):
        RandomSubnetMask(model, free + 1)
    for mask in (
        ParamNameSubnetMask(model, ["0.bias", "2.bias"]),
        ModuleNameSubnetMask(model, [""]),
        LastLayerSubnetMask(model, "0"),
    ):
        assert len(mask.select()) and int(mask.indices.max()) == free - 1


def test_random_entries_come_from_their_generator_alone():
    model, before = build("mlp-tanh").model, torch.get_rng_state()
    one, other = (
        RandomSubnetMask(model, 11, torch.Generator().manual_seed(s)).select() for s in (1, 2)
    )
    assert len(one.unique()) == len(other.unique()) == 11 and not torch.equal(one, other)
    assert torch.equal(RandomSubnetMask(model, 11).select(), RandomSubnetMask(model, 11).select())
    assert torch.equal(torch.get_rng_state(), before)


def test_variances_are_those_of_the_diagonal_posterior():
    case = build("mlp-tanh")
    la = Laplace(case.model, hessian_structure="diag", prior_structure="diag").fit(case.batches)
    la.prior_precision = torch.linspace(0.5, 5, la.n_params, dtype=torch.float64)
    chosen = LargestVarianceDiagLaplaceSubnetMask(case.model, 6, la).select()
    assert torch.equal(chosen, (1 / la.posterior_precision).topk(6).indices.sort().values)
    part = Laplace(case.model, hessian_structure="diag", subset_of_weights=["2.bias"])
    with pytest.raises(InvalidValue, match="diagonal posterior has 3 parameters"):
        LargestVarianceDiagLaplaceSubnetMask(case.model, 6, part).select(case.batches)
    with pytest.raises(InvalidValue, match="got hessian_structure='kron'"):
        LargestVarianceDiagLaplaceSubnetMask(case.model, 6, Laplace(case.model))
    with pytest.raises(InvalidType, match="not a Laplace.*got ReLU"):
        LargestVarianceDiagLaplaceSubnetMask(case.model, 6, torch.nn.ReLU())


def test_parts_of_the_model():
    case = build("vit")
    sizes = {name: p.numel() for name, p in case.model.named_parameters()}
    attention = sum(n for name, n in sizes.items() if name.startswith("attention."))
    assert ModuleNameSubnetMask(case.model, ["attention"]).select().numel() == attention
    head = LastLayerSubnetMask(case.model).select(case.batches)
    assert torch.equal(head, torch.arange(sum(sizes.values()))[-len(head) :])
    assert torch.equal(head, ModuleNameSubnetMask(case.model, ["head"]).select())
    assert torch.equal(ParamNameSubnetMask(case.model, ["position"]).select(), torch.arange(16))


def test_what_cannot_be_chosen_is_refused():
    model = build("mlp-tanh").model
    for wrong in (["1"], [], ["nowhere"], "0"):
        with pytest.raises(InvalidValue, match="module_names.*'2'"):
            ModuleNameSubnetMask(model, wrong)
    with pytest.raises(InvalidValue, match=r"parameter_names.*0\.weight"):
        ParamNameSubnetMask(model, ["weight"])
    with pytest.raises(InvalidValue, match="last_layer_name"):
        LastLayerSubnetMask(model).select()
    with pytest.raises(NotFitted, match="Call select first"):
        _ = LargestMagnitudeSubnetMask(model, 3).indices
    with pytest.raises(InvalidType, match="n_params_subnet"):
        LargestMagnitudeSubnetMask(model, 3.0)
