"""Subnetworks: the dense GGN cut out at some entries is the yardstick of all that follows."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import build
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse
from kfac_laplace.posterior.sharing import Layerwise

# Of few entries gradients are picked from their factors, of many from matrices.
MANY = ["mlp-regression", "cnn", "vit", "twice", "tokens"]
FEW = ["mlp-tanh", "vit", "conv-2d-groups"]
CASES = [(name, False) for name in MANY] + [(name, True) for name in FEW]
STRUCTURES = ["diag", "full", "lowrank"]


def chosen(model, few=False):
    """Indices: all of the first tensor and every third entry beyond, or a few in all tensors."""
    params = [*model.parameters()]
    total = sum(p.numel() for p in params)
    if few:
        return torch.arange(1, total, 11)
    first = params[0].numel()
    return torch.cat([torch.arange(first), torch.arange(first, total, 3)])


def fitted(name, structure, few=False, **options):
    """A posterior of some entries, at σ or T away from 1, and the dense H of them."""
    case = build(name)
    moved = {"sigma_noise": 0.6} if case.likelihood == "regression" else {"temperature": 0.7}
    indices = chosen(case.model, few)
    la = Laplace(
        case.model,
        case.likelihood,
        hessian_structure=structure,
        subset_of_weights=indices,
        **{"prior_structure": "scalar", "prior_precision": 0.8, **moved, **options},
    ).fit(case.batches)
    whole = oracles.ggn(case.model, *case.data, [n for n, _ in case.model.named_parameters()])
    dense = whole[indices[:, None], indices]
    if structure == "diag":
        dense = dense.diagonal().diag()
    return la, case, indices, dense, (1 / 0.36 if "sigma_noise" in moved else 1 / 0.7)


@pytest.mark.parametrize(("name", "few"), CASES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_precision_evidence_and_density_are_those_of_the_entries(structure, name, few):
    la, case, indices, dense, scale = fitted(name, structure, few)
    precision = scale * dense + 0.8 * torch.eye(len(indices), dtype=torch.float64)
    if structure != "lowrank":
        found = la.posterior_precision
        torch.testing.assert_close(found.diag() if structure == "diag" else found, precision)
    theta = parameters_to_vector(case.model.parameters()).detach()[indices]
    assert torch.equal(la.mean_subnet, theta) and la.n_params_subnet == len(indices)
    scatter = 0.8 * theta @ theta
    ratio = oracles.log_det_ratio(
        dense, scale, torch.full((len(indices),), 0.8, dtype=torch.float64)
    )
    torch.testing.assert_close(la.scatter, scatter)
    torch.testing.assert_close(la.log_det_ratio, ratio)
    temperature = 1.0 if case.likelihood == "regression" else 0.7
    evidence = la.log_likelihood / temperature - 0.5 * (ratio + scatter)
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)
    normal = torch.distributions.MultivariateNormal(theta, precision_matrix=precision)
    value = theta + torch.linspace(-1, 1, len(indices), dtype=torch.float64)
    torch.testing.assert_close(la.log_prob(value), normal.log_prob(value))


@pytest.mark.parametrize(("name", "few"), CASES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_output_covariances_are_those_of_the_entries(structure, name, few):
    """By each input, jointly over inputs where that is offered, and in the graph of inputs."""
    la, case, indices, dense, scale = fitted(name, structure, few)
    jacobian = oracles.jacobian(
        case.model, *case.data, [n for n, _ in case.model.named_parameters()]
    )
    delta = torch.full((len(indices),), 0.8, dtype=torch.float64)
    want = oracles.glm_covariance(jacobian[..., indices], dense, scale, delta)  # (n, k, k)
    found = la.predict(case.x).covariance
    n, c = len(case.x), found.shape[-1]
    rows = want.unflatten(2, (-1, c)).unflatten(1, (-1, c)).diagonal(dim1=1, dim2=3)
    torch.testing.assert_close(found.reshape(n, -1, c, c), rows.movedim(-1, 1))
    torch.testing.assert_close(la.functional_variance(jacobian[..., indices]), want)
    if case.likelihood == "regression":
        _, joint = la(case.x, joint=True)
        flat = jacobian[..., indices].flatten(0, 1)
        spread = torch.linalg.inv(scale * dense + delta.diag())
        torch.testing.assert_close(joint, flat @ spread @ flat.mT)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictions_carry_gradients(structure):
    la, case, *_ = fitted("mlp-tanh", structure)
    x = case.x.clone().requires_grad_()
    torch.testing.assert_close(
        la(x, link_approx="probit", enable_backprop=True), la(case.x, link_approx="probit")
    )
    torch.autograd.gradcheck(lambda z: la(z, link_approx="probit", enable_backprop=True), x)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_are_of_all_parameters_and_move_the_entries_alone(structure):
    """Moments of many draws; a draw goes back into the model as laplace-torch's do."""
    la, case, indices, dense, scale = fitted("mlp-tanh", structure)
    theta = parameters_to_vector(case.model.parameters()).detach()
    draws = la.sample(20000, torch.Generator().manual_seed(0))
    assert draws.shape == (20000, len(theta)) and torch.equal(la.mean, theta)
    assert la.n_params == len(theta)
    outside = torch.ones(len(theta), dtype=torch.bool).index_fill(0, indices, False)
    assert torch.equal(draws[:, outside], theta[outside].expand(20000, -1))
    want = torch.linalg.inv(scale * dense + 0.8 * torch.eye(len(indices), dtype=torch.float64))
    inside = draws[:, indices] - theta[indices]
    # Entries of a sample covariance have a standard error of at most √2 var/√n: 1 % of them.
    spread = want.diagonal().max()
    torch.testing.assert_close(inside.mT @ inside / 20000, want, rtol=0, atol=0.05 * float(spread))
    before = la.functional_samples(
        case.x, 3, pred_type="nn", generator=torch.Generator().manual_seed(1)
    )
    one = la.sample(3, torch.Generator().manual_seed(1))
    for draw, outputs in zip(one, before, strict=True):
        vector_to_parameters(draw, case.model.parameters())
        torch.testing.assert_close(case.model(case.x), outputs)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("sharing", ["scalar", "layerwise", "unit", "input", "diag"])
def test_sharings_are_those_of_the_whole_parameters(structure, sharing):
    """Entries that share a precision in the whole network share it in the subnetwork."""
    la, case, indices, dense, scale = fitted(
        "mlp-tanh", structure, prior_structure=sharing, prior_precision=1.0
    )
    everything = Laplace(
        case.model, case.likelihood, hessian_structure="diag", prior_structure=sharing
    ).fit(case.batches)
    whole = everything.posterior.prior
    ones = torch.arange(whole.length, dtype=torch.float64)
    names = whole.by_group(ones)
    places = whole.layouts.flatten(
        {name: names[name].expand(la.matrix) for name, la in whole.layouts.groups.items()}
    )[indices]
    kept, expected = places.unique(return_inverse=True)
    la.prior_precision = torch.linspace(0.5, 2, len(kept), dtype=torch.float64)
    delta = torch.linspace(0.5, 2, len(kept), dtype=torch.float64)[expected]
    assert torch.equal(la.prior_precision_diag, delta)
    torch.testing.assert_close(la.log_det_ratio, oracles.log_det_ratio(dense, scale, delta))
    theta = la.mean_subnet
    torch.testing.assert_close(la.scatter, (delta * theta**2).sum())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_the_prior_is_optimised_to_a_stationary_point(structure, method):
    la, *_ = fitted("mlp-regression", structure, prior_structure="layerwise", sigma_noise=1.0)
    la.optimize_prior(method)
    delta = la.prior_precision.clone().requires_grad_()
    sigma = la.sigma_noise.clone().requires_grad_()
    la.log_marginal_likelihood(delta, sigma).backward()
    assert float((delta * delta.grad).detach().abs().max()) < 1e-4
    assert float((sigma * sigma.grad).detach().abs()) < 1e-4


def test_the_exact_objective_is_the_evidence_of_the_full_structure():
    """By rows of the entries alone, on either side of their dual form."""
    la, *_ = fitted("mlp-tanh", "full")
    diagonal, *_ = fitted("mlp-tanh", "diag")
    torch.testing.assert_close(diagonal.evidence("exact").value, la.log_marginal_likelihood())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_calibration_and_means_by_entry(structure):
    la, case, indices, *_ = fitted("mlp-tanh", structure)
    la.calibrate([(case.x.flip(0), case.y.flip(0))], "validation")
    assert 0 <= float(la.posterior_scale) < float("inf")
    mean = torch.linspace(-1, 1, len(indices), dtype=torch.float64)
    shifted, *_ = fitted("mlp-tanh", structure, prior_mean=mean)
    torch.testing.assert_close(shifted.scatter, 0.8 * (la.mean_subnet - mean).square().sum())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_ways_to_write_a_subnetwork_agree(structure):
    case = build("mlp-tanh")
    indices = chosen(case.model)
    shapes = {name: p.shape for name, p in case.model.named_parameters()}
    mask = torch.zeros(sum(s.numel() for s in shapes.values()), dtype=torch.bool)
    mask[indices] = True
    parts = mask.split([s.numel() for s in shapes.values()])
    named = {n: m.reshape(s) for (n, s), m in zip(shapes.items(), parts, strict=True) if m.any()}
    shuffled = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    ways = [
        {"subset_of_weights": indices},
        {"subset_of_weights": shuffled},
        {"subset_of_weights": mask},
        {"subset_of_weights": named},
        {"subset_of_weights": "subnetwork", "subnetwork_indices": indices},
        {"subset_of_weights": "subnetwork", "subnetwork_mask": mask},
        {"subset_of_weights": "subnetwork", "subnetwork_mask": named},
    ]
    found = [
        Laplace(case.model, case.likelihood, hessian_structure=structure, **way) for way in ways
    ]
    assert all(each.options == found[0].options for each in found)
    evidences = {float(each.fit(case.batches).log_marginal_likelihood()) for each in found}
    assert len(evidences) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_tensors_are_those_that_patterns_name(structure):
    case = build("mlp-tanh")
    mask = {"2.weight": torch.ones(case.model[2].weight.shape, dtype=torch.bool)}
    made = [
        Laplace(case.model, case.likelihood, hessian_structure=structure, subset_of_weights=subset)
        for subset in (mask, ["2.weight"])
    ]
    one, other = (la.fit(case.batches) for la in made)
    assert torch.equal(one.log_marginal_likelihood(), other.log_marginal_likelihood())
    assert torch.equal(one(case.x), other(case.x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_and_further_data(structure, tmp_path):
    """Saved, loaded, added to and merged, a subnetwork stays what it was."""
    la, case, *_ = fitted("mlp-tanh", structure, prior_structure="layerwise")
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", case.model)
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(loaded(case.x), la(case.x)) and loaded.options == la.options
    twice = loaded.fit(case.batches, override=False)
    both = Curvature.of(case.model, la.options).fit([*case.batches, *case.batches])
    merged = Curvature.of(case.model, la.options).fit(case.batches)
    merged.merge(Curvature.of(case.model, la.options).fit(case.batches))
    for name, block in both.blocks.items():
        torch.testing.assert_close(twice.curvature.blocks[name].dense(), block.dense())
        torch.testing.assert_close(merged.blocks[name].dense(), block.dense())
    other = Laplace(case.model, case.likelihood, hessian_structure=structure,
                    subset_of_weights=torch.tensor([0, 1]))  # fmt: skip
    with pytest.raises(InvalidValue, match="subset_of_weights"):
        other.load_state_dict(la.state_dict())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_summary_counts_entries(structure):
    """By group and in all; of a full block each entry holds a row."""
    la, case, indices, *_ = fitted("mlp-tanh", structure, few=True, prior_structure="layerwise")
    assert f"{len(indices)} parameters" in repr(la)
    inside = [
        layer for layer in la.report([(case.x, case.y)]).layers if layer.treatment != "frozen"
    ]
    entries = [layout.size for layout in la.posterior.prior.layouts.groups.values()]
    assert [layer.parameters for layer in inside] == entries and sum(entries) == len(indices)
    rows = {"full": len(indices), "lowrank": 2 * case.x.shape[0]}  # two roots of three classes
    row = 8 * min(len(indices), rows.get(structure, 1))
    assert [layer.memory for layer in inside] == [row * count for count in entries]
    total = la.summary().split("in the posterior")[1].split()[0]
    assert int(total) == len(indices)


def model_with_frozen_bias():
    model = build("mlp-tanh").model
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("subset", "said"),
    [
        (torch.tensor([], dtype=torch.int64), "without entries"),
        (torch.tensor([1, 1]), "each of them once"),
        (torch.tensor([-1, 2]), "whole numbers ≥ 0"),
        (torch.tensor([10**6]), "frozen ones counted"),
        (torch.ones(3, dtype=torch.bool), "a mask of 3"),
        ({"0.weight": torch.ones(1, dtype=torch.bool)}, r"shape of its parameter"),
        ({"none": torch.ones(1, dtype=torch.bool)}, r"The parameters are \["),
        (torch.arange(1000) < 0, "without entries"),
    ],
)
def test_what_is_no_subnetwork_of_the_model_is_refused(subset, said):
    with pytest.raises(InvalidValue, match=said):
        Laplace(build("mlp-tanh").model, subset_of_weights=subset, hessian_structure="diag")


@pytest.mark.parametrize(
    "subset",
    [torch.ones(3), torch.ones(3, 1, dtype=torch.bool), {"0.weight": torch.ones(4)}, {"0.*": "a"}],
)
def test_what_is_no_mask_is_refused(subset):
    with pytest.raises(InvalidType, match="subset_of_weights.*boolean mask"):
        Laplace(build("mlp-tanh").model, subset_of_weights=subset, hessian_structure="diag")


def test_frozen_entries_kronecker_factors_and_tuners_are_refused():
    model, indices = model_with_frozen_bias(), torch.arange(40)
    with pytest.raises(InvalidValue, match=r"frozen parameters\. got 0\.bias"):
        Laplace(model, subset_of_weights=indices, hessian_structure="diag")
    with pytest.raises(InvalidValue, match="no Kronecker factors.*'full' or 'diag'"):
        Laplace(model, subset_of_weights=indices)
    with pytest.raises(UnsupportedUse, match="subnetwork is one of a trained network"):
        MarglikTuner(model, "classification", 7, subset_of_weights=torch.arange(3),
                     hessian_structure="diag")  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"subset_of_weights": "subnetwork"},
        {"subnetwork_indices": torch.arange(3)},
        {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.arange(3),
         "subnetwork_mask": torch.ones(3, dtype=torch.bool)},
    ],
)  # fmt: skip
def test_a_subnetwork_is_said_once(options):
    with pytest.raises(InvalidType, match="one set of indices or one mask"):
        Laplace(build("mlp-tanh").model, hessian_structure="diag", **options)


def test_a_sharing_object_is_told_of_whole_layouts():
    """A sharing from outside sees matrices as they are, whatever entries are inside."""

    class Watching(Layerwise):
        def index(self, layouts):
            self.__dict__["seen"] = {name: la.matrix for name, la in layouts.groups.items()}
            return super().index(layouts)

    sharing = Watching()
    fitted("mlp-tanh", "diag", prior_structure=sharing, prior_precision=1.0)
    case = build("mlp-tanh")
    whole = Laplace(case.model, case.likelihood, hessian_structure="diag").fit(case.batches)
    assert sharing.seen == {g.name: g.layout.matrix for g in whole.curvature.groups}
