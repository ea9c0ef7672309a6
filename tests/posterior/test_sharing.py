"""Which entries share a precision: how many there are, in which order, and what is refused."""

import pytest
import torch
from cases import build
from posterior import dense
from posterior.some_layouts import LAYOUTS, P

from kfac_laplace import KfacLaplaceError, Kron, Laplace
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.posterior.prior import Prior
from kfac_laplace.posterior.sharing import (
    NAMED,
    ByPattern,
    Diagonal,
    Layerwise,
    Scalar,
    Unit,
    check_sharing,
    resolve_sharing,
    sharing_to_plain,
)

PATTERNS = {"lin.*": "scalar", "*": "layerwise"}


def prior(structure):
    return Prior.of(resolve_sharing(structure), LAYOUTS, 0.0, torch.device("cpu"))


def entries(structure):
    """The place of each entry's precision, in parameter order."""
    found = prior(structure)
    places = found.by_group(torch.arange(float(found.length)))
    return LAYOUTS.flatten(
        {name: places[name].expand(layout.matrix) for name, layout in LAYOUTS.groups.items()}
    ).tolist()


# In parameter order: position (3), lin.weight (2, 3), lin.bias (2), conv.weight (4, 1, 2).
PLACES = {
    "scalar": [0] * P,
    "layerwise": [2] * 3 + [0] * 8 + [1] * 8,
    "unit": [6] * 3 + [0] * 3 + [1] * 3 + [0, 1] + [2, 2, 3, 3, 4, 4, 5, 5],
    "input": [8, 9, 10] + [0, 1, 2] * 2 + [3] * 2 + [4, 5] * 2 + [6, 7] * 2,
    "diag": list(range(P)),
    "patterns": [2] * 3 + [0] * 8 + [1] * 8,
    "mixed": [0] * 3 + [1] * 3 + [2] * 3 + [1, 2] + [0] * 8,
}
STRUCTURES = {
    **{name: name for name in NAMED},
    "patterns": PATTERNS,
    "mixed": {"[cp]o*": Scalar(), "*": "unit"},
}


@pytest.mark.parametrize("name", PLACES)
def test_which_entries_share(name):
    assert entries(STRUCTURES[name]) == PLACES[name]
    assert prior(STRUCTURES[name]).length == max(PLACES[name]) + 1


def test_names_objects_and_mappings():
    assert isinstance(resolve_sharing("unit"), Unit)
    own = Diagonal()
    assert resolve_sharing(own) is own
    assert resolve_sharing(PATTERNS) == ByPattern({"lin.*": Scalar(), "*": Layerwise()})
    for unknown in ("layers", {}, {"*": "layers"}):
        with pytest.raises(InvalidValue, match="prior_structure.*layerwise"):
            resolve_sharing(unknown)
    with pytest.raises(InvalidType, match="prior_structure"):
        resolve_sharing(3)


def test_patterns_that_fit_nothing_list_the_names():
    with pytest.raises(InvalidValue, match=r"encoder.*lin\.bias"):
        entries({"encoder.*": "scalar", "*": "layerwise"})
    with pytest.raises(InvalidValue, match=r"position.*'\*'"):
        entries({"lin.*": "scalar", "conv.*": "layerwise"})


def test_patterns_that_divide_a_block_name_the_remedy():
    with pytest.raises(InvalidValue, match="lin.bias.*joint_bias=False"):
        entries({"*.bias": "scalar", "*": "layerwise"})


def test_a_structure_is_told_as_it_is_written():
    with pytest.raises(InvalidValue, match=r"'diag' with hessian_structure=Kron\(rank=4\)\."):
        check_sharing(resolve_sharing("diag"), Kron(4))
    with pytest.raises(InvalidValue, match="'diag' with hessian_structure='kron'"):
        check_sharing(resolve_sharing("diag"), "kron")


@pytest.mark.parametrize("hessian", ["kron", "diag", "full", "lowrank"])
def test_which_structures_go_together(hessian):
    """A prior that varies within a block does not commute with Kronecker factors."""
    for structure in ("layerwise", "scalar", PATTERNS):
        check_sharing(resolve_sharing(structure), hessian)
    for structure in ("diag", "unit", {"lin.*": "diag", "*": "layerwise"}):
        if hessian == "kron":
            with pytest.raises(InvalidValue, match="layerwise.*hessian_structure"):
                check_sharing(resolve_sharing(structure), hessian)
        else:
            check_sharing(resolve_sharing(structure), hessian)


def test_plain_data_and_back():
    for structure in (*NAMED, PATTERNS, {"lin.*": {"*.bias": "scalar", "*": "unit"}, "*": "diag"}):
        plain = sharing_to_plain(structure)
        assert plain == structure
        assert sharing_to_plain(resolve_sharing(structure)) == plain
    assert sharing_to_plain(Layerwise()) == "layerwise"


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_one_precision_for_each_output_unit(structure):
    """A row of the weight with its bias; between one for each layer and one for each entry."""
    found = {}
    for sharing in ("layerwise", "unit", "diag"):
        la, case = dense.fit("mlp-tanh", hessian_structure=structure, prior_structure=sharing)
        la.optimize_prior()
        found[sharing] = la.log_marginal_likelihood().detach()
        if sharing == "unit":
            assert la.prior_precision.numel() == sum(case.model[i].out_features for i in (0, 2))
    assert found["layerwise"] < found["unit"] < found["diag"]


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_the_terms_of_a_unit_prior_equal_dense_algebra(structure):
    la, case = dense.fit("mlp-tanh", hessian_structure=structure, prior_structure="unit")
    values = torch.linspace(0.5, 3.0, la.prior_precision.numel(), dtype=torch.float64)
    la.prior_precision = values
    first, second = case.model[0], case.model[2]
    delta = torch.cat(
        [
            torch.cat([rows[:, None].expand_as(layer.weight).flatten(), rows])
            for layer, rows in (
                (first, values[: first.out_features]),
                (second, values[first.out_features :]),
            )
        ]
    )
    hessian, theta = dense.hessian(la, case.model), dense.theta(la, case.model)
    expected = (hessian + delta.diag()).logdet() - delta.log().sum()
    torch.testing.assert_close(la.log_det_ratio, expected, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(la.scatter, (delta * theta**2).sum(), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("structure", ["kron", "diag", "full", "lowrank"])
@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_groups_that_share_by_pattern_are_tuned_together(structure, method):
    """Three layers of which two share: the optimum lies between one for all and one for each."""
    found = {}
    for sharing in ("scalar", "layerwise"):
        la, _ = dense.fit("cnn", hessian_structure=structure, prior_structure=sharing)
        la.optimize_prior(method)
        found[sharing] = float(la.log_marginal_likelihood())
    la, case = dense.fit("cnn", hessian_structure=structure)
    first = la.curvature.groups[0].name.rpartition(".")[0]
    shared = {f"{first}.*": "layerwise", "*": "scalar"}
    la, _ = dense.fit("cnn", hessian_structure=structure, prior_structure=shared)
    la.optimize_prior(method)
    assert la.prior_precision.numel() == 2
    assert found["scalar"] < float(la.log_marginal_likelihood()) < found["layerwise"]


def test_biases_that_share_need_blocks_of_their_own():
    structure = {"*.bias": "scalar", "*": "layerwise"}
    case = build("mlp-tanh")
    with pytest.raises(KfacLaplaceError, match="joint_bias=False"):
        Laplace(case.model, "classification", prior_structure=structure).fit(case.batches)
    la = Laplace(case.model, "classification", prior_structure=structure, joint_bias=False)
    la.fit(case.batches)
    assert la.prior_precision.numel() == 3  # both biases, then each weight
    biases = [case.model[i].bias.detach().square().sum() for i in (0, 2)]
    torch.testing.assert_close(la.posterior.squares[0], sum(biases))


@pytest.mark.parametrize("structure", ["diag", "full", "lowrank"])
def test_inputs_that_do_not_matter_get_large_precisions(structure):
    """Relevance of inputs: y depends on the first alone, by the evidence of a linear model."""
    torch.manual_seed(0)
    x = torch.randn(60, 3, dtype=torch.float64)
    y = 2 * x[:, :1] + 0.3 * torch.randn(60, 1, dtype=torch.float64)
    model = torch.nn.Linear(3, 1).double()
    la = Laplace(model, "regression", prior_structure="input", hessian_structure=structure)
    for _ in range(5):  # the mode under the precisions, and these at the mode
        la.fit([(x, y)])
        la.optimize_prior()
        delta, sigma = la.prior_precision, la.sigma_noise
        design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1)
        mode = torch.linalg.solve(design.mT @ design / sigma**2 + delta.diag(), design.mT @ y)
        with torch.no_grad():
            model.weight.copy_(mode[:3].mT / sigma**2)
            model.bias.copy_(mode[3] / sigma**2)
    assert la.prior_precision[0] < 1 < la.prior_precision[1:3].min()
