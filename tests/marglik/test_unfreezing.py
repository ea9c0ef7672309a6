"""Layers that are frozen and unfrozen while the tuner is at work: δ goes on by name."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pulls import (
    START,
    N,
    assert_laplace_agrees,
    assert_pulls,
    by_name,
    data,
    layer,
    network,
    tuner_of,
)

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidValue

structures = pytest.mark.parametrize("structure", ["kron", "diag", "full"])


@pytest.mark.parametrize("likelihood", ["classification", "regression", "binary"])
@structures
@pytest.mark.parametrize("method", ["marglik", "mackay"])
def test_linear_probing_then_fine_tuning(likelihood, structure, method):
    """The head keeps its δ; layers that are unfrozen start at the initial one."""
    model, (x, y) = network(), data(likelihood)
    model[:4].requires_grad_(False)
    tuner = tuner_of(model, likelihood, hessian_structure=structure, method=method)
    tuner.step([(x, y)])
    head = by_name(tuner)["4.weight"]
    assert float(head) != START
    want = layer(4, head)
    assert_pulls(tuner, model, want, x, y, likelihood)
    model[2].requires_grad_(True)
    want |= layer(2, START)
    assert_pulls(tuner, model, want, x, y, likelihood)
    assert_laplace_agrees(tuner, want, x, y)
    assert tuner.groups == ("2.weight", "4.weight")
    model[0].bias.requires_grad_(True)  # without its weight: a group of its own
    want |= {"0.bias": START}
    assert_pulls(tuner, model, want, x, y, likelihood)
    record = tuner.step([(x, y)])
    found = by_name(tuner)
    la = Laplace(model, likelihood, hessian_structure=structure).fit([(x, y)])
    assert record.evidence == pytest.approx(
        float(la.log_marginal_likelihood(**record.hyperparameters)), rel=1e-9
    )
    model[0].weight.requires_grad_(True)  # joins its bias
    want = layer(0, found["0.bias"]) | layer(2, found["2.weight"]) | layer(4, found["4.weight"])
    assert_laplace_agrees(tuner, want, x, y)
    assert_pulls(tuner, model, want, x, y, likelihood)


@structures
@pytest.mark.parametrize("when", ["loss", "step", "prepare", "laplace"])
def test_a_change_is_seen_wherever_it_shows_first(when, structure):
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, hessian_structure=structure)
    tuner.step([(x, y)])
    found = by_name(tuner)
    model[0].requires_grad_(True)
    want = layer(0, START) | layer(2, found["2.weight"]) | layer(4, found["4.weight"])
    if when == "prepare":
        tuner.prepare([(x, y)])
    if when == "laplace":
        before = repr(tuner.state_dict())
        assert_laplace_agrees(tuner, want, x, y)
        assert repr(tuner.state_dict()) == before
    if when == "step":
        twin = copy.deepcopy(tuner)
        twin.loss(twin.model(x), y)  # sees it before the round: the same round then
        assert twin.step([(x, y)]).evidence == tuner.step([(x, y)]).evidence
        found = by_name(tuner)
        want = {name: found[name.split(".")[0] + ".weight"] for name in want}
        assert set(found) == {"0.weight", "2.weight", "4.weight"}
    assert_pulls(tuner, model, want, x, y)


@pytest.mark.parametrize(
    "structure", ["scalar", "unit", "diag", {"2.*": "scalar", "*": "layerwise"}]
)
def test_other_sharings(structure):
    """One δ for all stays; rows and entries keep their own; new ones start at the initial one."""
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, prior_structure=structure, hessian_structure="diag")
    tuner.step([(x, y)])
    before = tuner.laplace([(x, y)])
    known = before.posterior.prior.by_group(before.prior_precision)
    model[0].requires_grad_(True)
    params = dict(model.named_parameters())
    got = torch.autograd.grad(tuner.loss(model(x), y), [*params.values()])
    fit = torch.autograd.grad(F.cross_entropy(model(x), y), [*params.values()])
    one = known["2.weight"].flatten()[0]
    for (name, p), g, f in zip(params.items(), got, fit, strict=True):
        weight = name.split(".")[0] + ".weight"
        if weight in known:
            index = slice(0, -1) if name.endswith("weight") else slice(-1, None)
            full = known[weight].expand(before.curvature.blocks[weight].layout.matrix)
            delta = full[0][:, index].reshape(p.shape)
        else:
            delta = one if structure == "scalar" else torch.tensor(START)
        torch.testing.assert_close(g, f + delta * p.detach() / N)


@pytest.mark.parametrize("subset", ["last_layer", ["4.*"], ["2.*", "4.*"]])
def test_only_what_the_options_admit(subset):
    """Layers outside are frozen and unfrozen without a word, and are never pulled."""
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, subset_of_weights=subset)
    tuner.step([(x, y)])
    deltas = {n: d for g, d in by_name(tuner).items() for n in layer(g.split(".")[0], d)}
    model[0].requires_grad_(True)
    outside = {n: 0.0 for n, _ in model.named_parameters() if n not in deltas}
    assert_pulls(tuner, model, deltas | outside, x, y)
    assert_laplace_agrees(tuner, deltas, x, y)


def test_initial_precisions_by_pattern_hold_for_new_layers():
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, prior_precision={"0.*": 7.0, "*": 1.0}, subset_of_weights="all")
    with pytest.raises(InvalidValue, match="pattern"):
        tuner.prepare([(x, y)])  # of a layer that is not trained yet
    tuner = tuner_of(model, prior_precision={"*.weight": 7.0, "*": 7.0})
    tuner.step([(x, y)])
    found = by_name(tuner)
    model[0].requires_grad_(True)
    want = layer(0, 7.0) | layer(2, found["2.weight"]) | layer(4, found["4.weight"])
    assert_pulls(tuner, model, want, x, y)


def test_a_vector_of_initial_precisions_has_none_for_new_layers():
    """Said with the layer's name and the remedy; freezing it again goes on as before."""
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, prior_precision=torch.tensor([1.0, 2.0]))
    tuner.step([(x, y)])
    before, found = repr(tuner.state_dict()), by_name(tuner)
    model[0].requires_grad_(True)
    for refused in (lambda: tuner.loss(model(x), y), lambda: tuner.step([(x, y)])):
        for _ in range(2):  # not once and then forgotten
            with pytest.raises(InvalidValue, match=r"0\.weight.*prior_precision.*patterns"):
                refused()
    assert repr(tuner.state_dict()) == before
    model[0].requires_grad_(False)
    assert_pulls(tuner, model, layer(2, found["2.weight"]) | layer(4, found["4.weight"]), x, y)
    model[2].requires_grad_(False)  # fewer need no values
    assert_pulls(tuner, model, layer(4, found["4.weight"]), x, y)


def test_before_the_first_batch_all_share_the_initial_one():
    model, (x, y) = network(), data()
    model[:4].requires_grad_(False)
    tuner = tuner_of(model)
    assert_pulls(tuner, model, layer(4, START), x, y)
    model[2].requires_grad_(True)
    assert_pulls(tuner, model, layer(2, START) | layer(4, START), x, y)
    model[4].requires_grad_(False)
    assert_pulls(tuner, model, layer(2, START), x, y)


def test_a_resumed_tuner_has_no_examples_and_asks_for_some():
    """Which layer a parameter belongs to shows in use alone."""
    model, (x, y) = network(), data()
    model[0].requires_grad_(False)
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    found = by_name(tuner)
    resumed = tuner_of(model)
    resumed.load_state_dict(tuner.state_dict())
    model[0].requires_grad_(True)
    for _ in range(2):
        with pytest.raises(InvalidValue, match=r"new: 0\.weight, 0\.bias.*prepare"):
            resumed.loss(model(x), y)
    resumed.prepare([(x, y)])
    want = layer(0, START) | layer(2, found["2.weight"]) | layer(4, found["4.weight"])
    assert_pulls(resumed, model, want, x, y)


def test_nothing_left_to_train():
    model, (x, y) = network(), data()
    tuner = tuner_of(model)
    tuner.step([(x, y)])
    output = model(x)
    model.requires_grad_(False)
    with pytest.raises(InvalidValue, match="no trainable parameter"):
        tuner.loss(output, y)
    model.requires_grad_(True)
    tuner.loss(output, y)


def test_adams_moments_go_on_where_nothing_is_new():
    """Freezing a layer: the others take the steps that they would have taken without it."""
    model, (x, y) = network(), data()
    tuner = tuner_of(model, "regression", fix_sigma_noise=True)
    x, y = data("regression")
    tuner.step([(x, y)])
    moments = tuner.state_dict()["adam"]["state"][0]
    model[2].requires_grad_(False)
    tuner.loss(model(x), y)
    kept = tuner.state_dict()["adam"]["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(kept[name], moments[name][[0, 2]])
    assert kept["step"] == moments["step"]


def test_adam_starts_anew_where_precisions_are_new():
    """Old step counts with new zeros would make steps of many learning rates; σ goes on."""
    x, y = data("regression")
    model = network()
    model[0].requires_grad_(False)
    tuner = tuner_of(model, "regression", n_hypersteps=10, lr_hyp=0.1)
    for _ in range(5):
        tuner.step([(x, y)])
    sigma = tuner.state_dict()["adam"]["state"][1]
    model[0].requires_grad_(True)
    tuner.loss(model(x), y)
    state = tuner.state_dict()["adam"]["state"]
    assert 0 not in state and torch.equal(state[1]["exp_avg"], sigma["exp_avg"])
    before = by_name(tuner)
    tuner.step([(x, y)])
    moved = (by_name(tuner)["0.weight"] / before["0.weight"]).log().abs()
    assert float(moved) <= 10 * 0.1 * 1.01  # ten steps of one learning rate, at most


def test_a_state_saved_right_after_unfreezing_goes_on():
    """Moments of the new precisions are not there yet."""
    x, y = data("regression")
    model = network()
    model[0].requires_grad_(False)
    tuner, resumed = (tuner_of(model, "regression") for _ in range(2))
    tuner.step([(x, y)])
    model[0].requires_grad_(True)
    tuner.loss(model(x), y)
    resumed.load_state_dict(tuner.state_dict())
    first, second = tuner.step([(x, y)]), resumed.step([(x, y)])
    assert first.evidence == second.evidence


def test_best_compares_rounds_over_the_same_parameters():
    """The evidence of a network of which less is uncertain is another number."""
    model, (x, y) = network(), data()
    model[:4].requires_grad_(False)
    tuner = tuner_of(model)
    first = [tuner.step([(x, y)]) for _ in range(2)]
    assert tuner.best is max(first, key=lambda record: record.objective)
    model.requires_grad_(True)
    later = [tuner.step([(x, y)]) for _ in range(2)]
    assert tuner.best is max(later, key=lambda record: record.objective)
    assert [len(r.groups) for r in tuner.history] == [1, 1, 3, 3]
    for record in tuner.history:
        assert len(record.hyperparameters["prior_precision"]) == len(record.groups)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (model[4], model)]
    assert [r.parameters for r in tuner.history] == [sizes[0], sizes[0], sizes[1], sizes[1]]
