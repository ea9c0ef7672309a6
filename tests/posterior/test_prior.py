"""Prior structures: how many precisions, in which order, and what packs back into what."""

import pytest
import torch

from kfac_laplace import Laplace
from kfac_laplace.curvature.rows.layout import Layout
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior import prior as priors
from kfac_laplace.posterior.prior import PriorStructure


def size(*shape):
    return torch.Size(shape)


# A layer with its bias, a grouped convolution without one, and a lone parameter registered first.
LAYOUTS = {
    "lin.weight": Layout(("lin.weight", "lin.bias"), (size(2, 3), size(2)), (1, 2, 4)),
    "conv.weight": Layout(("conv.weight",), (size(4, 1, 2),), (2, 2, 2)),
    "position": Layout(("position",), (size(3),), (1, 1, 3)),
}
PARAMS = ("position", "lin.weight", "lin.bias", "conv.weight")
P = 3 + 6 + 2 + 8


def structure(sharing):
    return PriorStructure(sharing, LAYOUTS, PARAMS)


@pytest.mark.parametrize(("sharing", "length"), [("scalar", 1), ("layerwise", 3), ("diag", P)])
def test_number_of_precisions(sharing, length):
    prior = structure(sharing)
    assert prior.length == length and prior.size == P
    one = prior.full(torch.tensor(2.0))
    assert torch.equal(one, torch.full((length,), 2.0))
    many = torch.arange(1.0, length + 1)
    assert torch.equal(prior.full(many), many)


@pytest.mark.parametrize("sharing", ["scalar", "layerwise", "diag"])
def test_wrong_lengths_are_told_the_right_one(sharing):
    prior = structure(sharing)
    with pytest.raises(InvalidValue, match=f"{prior.length} precisions"):
        prior.full(torch.ones(5))


def test_layerwise_precisions_follow_the_order_of_the_groups():
    deltas = structure("layerwise").by_group(torch.tensor([1.0, 2.0, 3.0]))
    assert {name: float(value) for name, value in deltas.items()} == {
        "lin.weight": 1,
        "conv.weight": 2,
        "position": 3,
    }


def test_diagonal_precisions_follow_the_order_of_the_parameters():
    """Position first, although its group comes last; the bias is the layer's last column."""
    vector = torch.arange(float(P))
    deltas = structure("diag").by_group(vector)
    assert torch.equal(deltas["position"], vector[:3].reshape(1, 1, 3))
    joint = torch.cat([vector[3:9].reshape(2, 3), vector[9:11].reshape(2, 1)], 1)
    assert torch.equal(deltas["lin.weight"], joint[None])
    assert torch.equal(deltas["conv.weight"], vector[11:].reshape(2, 2, 2))


@pytest.mark.parametrize("lead", [(), (5,)])
def test_flatten_undoes_pack(lead):
    prior = structure("layerwise")
    vector = torch.randn(*lead, P)
    assert torch.equal(prior.flatten(prior.pack(vector)), vector)


def test_tensors_by_parameter_have_their_own_shapes():
    tensors = structure("scalar").by_parameter(torch.arange(float(P)))
    assert list(tensors) == list(PARAMS)
    assert tensors["lin.weight"].shape == (2, 3) and tensors["conv.weight"].shape == (4, 1, 2)
    flat = torch.cat([t.flatten() for t in tensors.values()])
    assert torch.equal(flat, torch.arange(float(P)))


@pytest.mark.parametrize("sharing", ["scalar", "layerwise", "diag"])
def test_precisions_keep_their_graph(sharing):
    prior = structure(sharing)
    delta = torch.full((prior.length,), 2.0, requires_grad=True)
    total = sum(
        value.log().expand(LAYOUTS[name].matrix).sum()
        for name, value in prior.by_group(delta).items()
    )
    total.backward()
    counts = {"scalar": [P], "layerwise": [8, 8, 3], "diag": [1] * P}[sharing]
    torch.testing.assert_close(delta.grad, torch.tensor(counts) / 2.0)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf, [], [1.0, -1.0]])
def test_hyperparameters_are_positive_and_finite(value):
    with pytest.raises(InvalidValue, match="sigma"):
        priors.positive(value, "sigma_noise")


def test_hyperparameters_are_float64_and_keep_their_graph():
    delta = torch.tensor(2.0, requires_grad=True)
    tensor = priors.positive(delta, "prior_precision")
    assert tensor.dtype == torch.float64
    tensor.log().backward()
    torch.testing.assert_close(delta.grad, torch.tensor(0.5))


@pytest.mark.parametrize("hessian", ["kron", "diag", "full"])
def test_which_structures_go_together(hessian):
    for sharing in ("layerwise", "scalar"):
        priors.check_sharing(sharing, hessian)
    if hessian == "kron":
        with pytest.raises(InvalidValue, match="layerwise.*hessian_structure"):
            priors.check_sharing("diag", hessian)
    else:
        priors.check_sharing("diag", hessian)
    with pytest.raises(InvalidValue, match="prior_structure"):
        priors.check_sharing("unit", hessian)


@pytest.mark.parametrize("name", ["sigma_noise", "temperature", "prior_mean"])
def test_messages_name_the_argument_they_were_called_for(name):
    with pytest.raises(InvalidValue, match=rf"^{name}: one number is needed\. got shape \(2,\)"):
        priors.one_number(torch.ones(2), name)
    with pytest.raises(InvalidValue, match=rf"^{name}: must be finite"):
        priors.real(torch.nan, name)


@pytest.mark.parametrize("name", ["sigma_noise", "temperature"])
def test_options_of_a_posterior_that_are_one_number_are_told_apart(name):
    with pytest.raises(InvalidValue, match=f"^{name}: one number"):
        Laplace(torch.nn.Linear(2, 1), "regression", **{name: torch.ones(2)})
