"""The prior: precisions by number and by pattern, means, quadratic form, log-determinant."""

import pytest
import torch
from cases import build
from posterior import dense
from posterior.some_layouts import LAYOUTS, PARAMS, P, parameters

from kfac_laplace import KfacLaplaceError, Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted
from kfac_laplace.posterior.prior import Prior, given_precision
from kfac_laplace.posterior.sharing import resolve_sharing

CPU = torch.device("cpu")
SHARINGS = ("scalar", "layerwise", "unit", "diag", {"lin.*": "unit", "*": "scalar"})
everywhere = pytest.mark.parametrize("sharing", SHARINGS, ids=[*SHARINGS[:-1], "patterns"])


def prior(sharing, mean=0.0):
    return Prior.of(resolve_sharing(sharing), LAYOUTS, mean, CPU)


def spread(prior):
    return torch.linspace(0.5, 3.0, prior.length, dtype=torch.float64)


def by_entry(prior, precision):
    """δ of each entry, in parameter order."""
    deltas = prior.by_group(precision)
    groups = LAYOUTS.groups.items()
    return LAYOUTS.flatten({name: deltas[name].expand(la.matrix) for name, la in groups})


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in PARAMS])


@everywhere
def test_one_value_stands_for_all_and_wrong_lengths_are_told_the_right_one(sharing):
    found = prior(sharing)
    assert torch.equal(found.full(torch.tensor(2.0)), torch.full((found.length,), 2.0))
    many = torch.arange(1.0, found.length + 1)
    assert torch.equal(found.full(many), many)
    with pytest.raises(InvalidValue, match=f"{found.length} precisions"):
        found.full(torch.ones(P + 1))


def test_layerwise_precisions_follow_the_order_of_the_groups():
    deltas = prior("layerwise").by_group(torch.tensor([1.0, 2.0, 3.0]))
    assert {name: float(value) for name, value in deltas.items()} == {
        "lin.weight": 1,
        "conv.weight": 2,
        "position": 3,
    }


def test_diagonal_precisions_follow_the_order_of_the_parameters():
    """Position first, although its group comes last; the bias is the layer's last column."""
    vector = torch.arange(float(P))
    deltas = prior("diag").by_group(vector)
    assert torch.equal(deltas["position"], vector[:3].reshape(1, 1, 3))
    joint = torch.cat([vector[3:9].reshape(2, 3), vector[9:11].reshape(2, 1)], 1)
    assert torch.equal(deltas["lin.weight"], joint[None])
    assert torch.equal(deltas["conv.weight"], vector[11:].reshape(2, 2, 2))


MEANS = {
    "zero": (0.0, torch.zeros(P)),
    "number": (0.3, torch.full((P,), 0.3, dtype=torch.float64)),
    "tensor": (torch.linspace(-1, 1, P), torch.linspace(-1, 1, P)),
    "patterns": (
        {"position": 1.0, "*.bias": -0.5, "*": 0},
        torch.tensor([1.0] * 3 + [0.0] * 6 + [-0.5] * 2 + [0.0] * 8),
    ),
}


@everywhere
@pytest.mark.parametrize("mean", MEANS)
def test_every_term_equals_the_naive_one(sharing, mean):
    """P₀ as a diagonal over all entries, differentiable in parameters and precisions."""
    given, expected_mean = MEANS[mean]
    found, theta = prior(sharing, given), parameters()
    precision = spread(found).requires_grad_()
    delta, shift = by_entry(found, precision), flat(theta) - expected_mean.double()
    naive = (delta * shift**2).sum()
    value = found.quadratic(theta, precision)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, naive, rtol=1e-13, atol=0)
    wrt = (precision, *theta.values())
    got, expected = (torch.autograd.grad(v, wrt, retain_graph=True) for v in (value, naive))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close((precision * found.squares(theta)).sum(), naive, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.log_det(precision), delta.log().sum(), rtol=1e-13, atol=0)


@everywhere
def test_sums_of_matrices_follow_the_sharing(sharing):
    found = prior(sharing)
    vector = torch.randn(P, dtype=torch.float64)
    sums = torch.zeros(found.length, dtype=torch.float64)
    places = by_entry(found, torch.arange(float(found.length))).long()
    for place, value in zip(places.tolist(), vector.tolist(), strict=True):
        sums[place] += value
    got = found.shared_sums(LAYOUTS.pack_vector(vector))
    torch.testing.assert_close(got, sums, rtol=1e-13, atol=1e-14)


# --- by patterns ------------------------------------------------------------------------------


def test_precisions_by_pattern():
    """The first pattern that fits counts; precisions follow their own order."""
    given = given_precision({"position": 3.0, "lin.*": 0.5, "*": 7}, CPU)
    assert prior("layerwise").resolve(given).tolist() == [0.5, 7.0, 3.0]
    assert prior("unit").resolve(given).tolist() == [0.5] * 2 + [7.0] * 4 + [3.0]
    assert prior("diag").resolve(given).tolist() == [3.0] * 3 + [0.5] * 8 + [7.0] * 8
    assert prior("scalar").resolve({"*": 2.0}).tolist() == [2.0]


def test_patterns_that_divide_a_precision_are_refused():
    given = {"lin.bias": 1.0, "*": 2.0}
    assert prior("diag").resolve(given).tolist() == [2.0] * 9 + [1.0] * 2 + [2.0] * 8
    for sharing, remedy in (("layerwise", "joint_bias=False"), ("scalar", "prior_structure")):
        with pytest.raises(InvalidValue, match=rf"lin\.bias.*{remedy}"):
            prior(sharing).resolve(given)


@pytest.mark.parametrize("option", ["prior_precision", "prior_mean"])
def test_patterns_that_do_not_fit_the_parameters(option):
    def use(patterns):
        if option == "prior_mean":
            return prior("layerwise", patterns)
        return prior("layerwise").resolve(patterns)

    with pytest.raises(InvalidValue, match=rf"{option}.*encoder.*lin\.bias"):
        use({"encoder.*": 1.0, "*": 2.0})
    with pytest.raises(InvalidValue, match=rf"{option}.*position.*'\*'"):
        use({"lin.*": 1.0, "conv.*": 2.0})


def test_numbers_in_patterns_are_checked():
    case = build("mlp-tanh")
    for option, number, error in (
        ("prior_precision", -1.0, InvalidValue),
        ("prior_precision", "much", InvalidType),
        ("prior_mean", torch.nan, InvalidValue),
        ("prior_mean", torch.ones(2), InvalidValue),
    ):
        with pytest.raises(error, match=option):
            Laplace(case.model, "classification", **{option: {"*": number}})


def test_a_mean_of_a_wrong_length():
    with pytest.raises(InvalidValue, match=f"prior_mean.*{P}"):
        prior("layerwise", torch.zeros(P + 1))


# --- in a posterior -----------------------------------------------------------------------------


def test_initial_precisions_by_pattern_show_after_the_fit():
    case = build("mlp-tanh")
    given = {"2.*": 5.0, "*": 0.5}
    la = Laplace(case.model, "classification", prior_precision=given)
    with pytest.raises(NotFitted, match="fit"):
        la.prior_precision  # noqa: B018
    la.fit(case.batches)
    assert la.prior_precision.tolist() == [0.5, 5.0]
    la.prior_precision = {"0.*": 2.0, "*": 3.0}
    assert la.prior_precision.tolist() == [2.0, 3.0]
    by_pattern = la.log_marginal_likelihood({"0.*": 4.0, "*": 1.0})
    assert torch.equal(by_pattern, la.log_marginal_likelihood(torch.tensor([4.0, 1.0])))


def test_patterns_that_do_not_fit_leave_the_posterior_as_it_was():
    la, _ = dense.fit("mlp-tanh", prior_precision=3.0)
    with pytest.raises(InvalidValue, match="joint_bias=False"):
        la.prior_precision = {"*.bias": 1.0, "*": 2.0}
    assert la.prior_precision.tolist() == [3.0, 3.0]
    split, _ = dense.fit("mlp-tanh", joint_bias=False)
    split.prior_precision = {"*.bias": 1.0, "*": 2.0}
    assert split.prior_precision.tolist() == [2.0, 1.0, 2.0, 1.0]


def test_a_setter_takes_patterns_before_the_fit():
    case = build("mlp-tanh")
    la = Laplace(case.model, "classification")
    la.prior_precision = {"0.*": 2.0, "*": 3.0}
    assert la.fit(case.batches).prior_precision.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_the_scales_of_norms_may_have_a_mean_of_one(structure):
    """Means by pattern may differ within a block: a norm's scale and shift."""
    mean = {"norm.weight": 1.0, "*": 0.0}
    la, case = dense.fit("vit", hessian_structure=structure, prior_mean=mean, prior_precision=2.0)
    shift = {
        name: p.detach() - (1.0 if name == "norm.weight" else 0.0)
        for name, p in case.model.named_parameters()
    }
    expected = 2.0 * sum(value.square().sum() for value in shift.values())
    torch.testing.assert_close(la.scatter, expected, rtol=1e-12, atol=0)
    plain, _ = dense.fit("vit", hessian_structure=structure, prior_precision=2.0)
    assert float(la.scatter) < float(plain.scatter)


def test_a_loaded_state_counts_where_patterns_wait():
    la, case = dense.fit("mlp-tanh")
    la.prior_precision = torch.tensor([2.0, 3.0])
    fresh = Laplace(case.model, "classification", prior_precision={"*": 7.0})
    fresh.load_state_dict(la.state_dict())
    assert fresh.prior_precision.tolist() == [2.0, 3.0]


def test_means_by_pattern_are_saved(tmp_path):
    la, case = dense.fit(
        "mlp-tanh",
        prior_mean={"2.*": 0.2, "*": 0.0},
        prior_structure={"0.*": "scalar", "*": "layerwise"},
        prior_precision={"0.*": 2.0, "*": 3.0},
    )
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", case.model)
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    other, _ = dense.fit("mlp-tanh")
    with pytest.raises(KfacLaplaceError, match="prior_structure|prior_mean"):
        other.load_state_dict(la.state_dict())
