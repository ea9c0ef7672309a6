"""Objectives that look at the data once more: searches, rounds, states, and what is refused."""

import copy
import logging

import pytest
import torch
from cases import build
from posterior.objectives.exact_cases import CASES, dense_of, entry_precisions
from torch import nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training
from kfac_laplace.errors import InvalidValue
from kfac_laplace.posterior.objectives import Bracket, Columns, ExactGGN, GammaHyperprior, forms

NAMES = ("exact", "columns", "bounds")


@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("name", ["classes", "cnn", "regression", "scalar", "padded"])
def test_the_optimum_is_that_of_the_dense_structure(name, method):
    case = CASES[name]()
    dense = case.fitted(hessian_structure="full").optimize_prior(tolerance=1e-7)
    la = case.fitted().optimize_prior(method, objective="exact", tolerance=1e-6, n_steps=5000)
    torch.testing.assert_close(la.prior_precision, dense.prior_precision, rtol=1e-4, atol=0)
    torch.testing.assert_close(la.sigma_noise, dense.sigma_noise, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_searches_climb(name):
    la = CASES["vit"]().fitted()
    before = la.evidence(name).value
    after = la.optimize_prior(objective=name).evidence(name).value
    assert after > before


def test_log_marginal_likelihood_stays_that_of_the_posterior():
    la = CASES["vit"]().fitted()
    kron = la.log_marginal_likelihood()
    la.evidence("exact")
    assert torch.equal(la.log_marginal_likelihood(), kron)


def test_objects_are_taken_like_names():
    la, other = CASES["classes"]().fitted(), CASES["classes"]().fitted()
    la.optimize_prior(objective=Columns())
    other.optimize_prior(objective="columns")
    assert torch.equal(la.prior_precision, other.prior_precision)


@pytest.mark.parametrize("name", NAMES)
def test_after_loading_there_are_no_data(name, tmp_path):
    case = CASES["classes"]()
    la = case.fitted()
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", case.model)
    for verb in (lambda: loaded.optimize_prior(objective=name), lambda: loaded.evidence(name)):
        with pytest.raises(InvalidValue, match="training data.*loader="):
            verb()
    assert torch.equal(loaded.prior_precision, la.prior_precision)
    loaded.optimize_prior(objective=name, loader=case.batches)
    la.optimize_prior(objective=name)
    torch.testing.assert_close(loaded.prior_precision, la.prior_precision, rtol=1e-9, atol=0)
    loaded.evidence(name, loader=case.batches)


def test_data_added_to_a_fit_are_all_looked_at():
    case = CASES["classes"]()
    la = Laplace(case.model).fit(case.batches[:2])
    la.fit(case.batches[2:], override=False)
    want = case.fitted()
    assert float(la.evidence().value) == pytest.approx(float(want.evidence().value), rel=1e-10)


def test_other_data_are_refused():
    case = CASES["classes"]()
    la = case.fitted()
    before = la.prior_precision.clone()
    for loader, seen in ((case.batches[:2], "6"), ([*case.batches] * 2, "more than 7"), ([], "0")):
        with pytest.raises(InvalidValue, match=f"got {seen} examples where the fit saw 7"):
            la.optimize_prior(objective="exact", loader=loader)
    once = Laplace(case.model).fit(batch for batch in case.batches)
    with pytest.raises(InvalidValue, match="generator can be read only once"):
        once.optimize_prior(objective="columns")
    assert torch.equal(la.prior_precision, before)


def test_many_precisions_of_many_rows_are_refused(monkeypatch):
    la = CASES["diag-prior"]().fitted()
    monkeypatch.setattr(forms, "MAX_KEPT", 100)
    with pytest.raises(InvalidValue, match="too many to keep.*layerwise"):
        la.evidence("exact")
    la = CASES["vit"]().fitted()
    monkeypatch.setattr(forms, "MAX_GRAMS", 100)
    with pytest.raises(InvalidValue, match="Gram matrices.*'columns'"):
        la.evidence("exact")


class Blind(nn.Module):
    """A layer whose outputs are multiplied by zero: an effect in the graph, no curvature."""

    def __init__(self):
        super().__init__()
        self.seen, self.blind = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.seen(x) + 0.0 * self.blind(x)


@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("name", NAMES)
def test_blind_precisions_stay(name, method, caplog):
    torch.manual_seed(0)
    model, x = Blind().double(), torch.randn(9, 3).double()
    loader = [(x, torch.arange(9) % 3)]
    la = Laplace(model).fit(loader)
    with caplog.at_level(logging.WARNING):
        la.optimize_prior(method, objective=name, n_steps=2000)
    place = [*la.curvature.blocks].index("blind.weight")
    assert float(la.prior_precision[place]) == 1.0
    assert float(la.prior_precision[1 - place]) != 1.0
    assert "no curvature" in caplog.text and "directions" not in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_precisions_without_effect_stay(name):
    la = CASES["unused"]().fitted()
    la.optimize_prior(objective=name)
    place = [*la.curvature.blocks].index("idle.weight")
    assert float(la.prior_precision[place]) == 1.0
    assert la.evidence(name).effective_dimensions["idle.weight"] == 0
    want = dense_of(CASES["unused"](), la)
    delta = entry_precisions(la)
    idle = torch.cat(
        [
            torch.full((p.numel(),), "idle" in n)
            for n, p in CASES["unused"]().model.named_parameters()
        ]
    )
    scatter = float((delta * want.theta().square())[idle].sum())
    exact = float(la.evidence("exact").value)
    assert exact == pytest.approx(want.evidence(delta) + 0.5 * scatter, rel=1e-9)


@pytest.mark.parametrize("method", ["marglik", "mackay"])
@pytest.mark.parametrize("name", NAMES)
def test_rounds_of_a_tuner(name, method):
    """A record holds the objective's value beside the evidence of the structure."""
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, case.likelihood, 7, objective=name, method=method)
    record = tuner.step(case.batches)
    la = tuner.laplace(case.batches)
    assert record.evidence == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-9)
    if name == "exact":
        assert record.objective == pytest.approx(float(la.evidence().value), rel=1e-9)
    assert record.objective != record.evidence


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_tuner_goes_on_to_the_last_bit(name):
    case = build("cnn")

    def made():
        return MarglikTuner(case.model, case.likelihood, 7, objective=name)

    whole, first = made(), made()
    whole.step(case.batches), first.step(case.batches)
    resumed = made()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    records = whole.step(case.batches), resumed.step(case.batches)
    assert torch.equal(*(r.hyperparameters["prior_precision"] for r in records))
    assert records[0].objective == records[1].objective
    other = MarglikTuner(case.model, case.likelihood, 7)
    with pytest.raises(InvalidValue, match=f"{name} in the state, auto here"):
        other.load_state_dict(first.state_dict())


def test_a_round_that_fails_changes_nothing():
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, case.likelihood, 7, objective="exact")
    with pytest.raises(InvalidValue, match="generator can be read only once"):
        tuner.step(batch for batch in case.batches)
    assert not tuner.history and float(tuner.hyperparameters()["prior_precision"]) == pytest.approx(
        7e-4
    )
    assert tuner.step(case.batches).epoch == 1


def test_the_training_loop_takes_them():
    case = build("mlp-tanh")
    la, _, margliks, _ = marglik_training(
        case.model, case.batches, n_epochs=2, objective="columns", method="mackay"
    )
    assert len(margliks) == 2 and bool((la.prior_precision > 0).all())


# --- hyperpriors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["auto", "exact", "columns"])
def test_a_gamma_hyperprior_is_a_density_in_log_delta(inner):
    """log p(log δ) of torch's Gamma, with δ's Jacobian; it pulls precisions to a/b."""
    la = CASES["vit"]().fitted(prior_precision=0.3)
    goal = GammaHyperprior(2.0, 5.0, inner).on(la.posterior, la._data_from(None))
    plain = goal.objective(la.posterior)
    gamma = torch.distributions.Gamma(*torch.tensor([2.0, 5.0]).double())
    want = (gamma.log_prob(la.prior_precision) + la.prior_precision.log()).sum()
    assert float(goal(la.posterior) - plain) == pytest.approx(float(want), rel=1e-9)
    la.optimize_prior(objective=GammaHyperprior(1e6, 5e5, inner))
    torch.testing.assert_close(
        la.prior_precision, torch.full_like(la.prior_precision, 2.0), rtol=1e-3, atol=0
    )


def test_hyperpriors_in_a_tuner_and_what_they_refuse():
    case = build("mlp-tanh")
    goal = GammaHyperprior(1.0, 1.0, "exact")
    tuner = MarglikTuner(case.model, case.likelihood, 7, objective=goal)
    record = tuner.step(case.batches)
    assert record.objective != record.evidence
    with pytest.raises(InvalidValue, match="marglik"):
        MarglikTuner(case.model, case.likelihood, 7, objective=goal, method="mackay")
    la = CASES["classes"]().fitted()
    with pytest.raises(InvalidValue, match="marglik"):
        la.optimize_prior("mackay", objective=goal)
    with pytest.raises(InvalidValue, match="no evidence"):
        la.evidence(goal)
    for shape, rate, inner in ((0.0, 1.0, "auto"), (1.0, -1.0, "auto"), (1.0, 1.0, "exakt")):
        with pytest.raises(InvalidValue):
            GammaHyperprior(shape, rate, inner)


def test_graphs_with_targets_at_nodes():
    """Nodes are the positions of a graph; a graph is an example."""

    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x, edge_index, batch):
            mixed = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
            return self.last(self.first(x + mixed).tanh())

    torch.manual_seed(0)
    model = Passing().double()
    graph = {
        "x": torch.randn(5, 3).double(),
        "edge_index": torch.tensor([[0, 1, 3, 4], [1, 2, 4, 3]]),
        "batch": torch.tensor([0, 0, 0, 1, 1]),
        "labels": torch.tensor([0, 1, 2, 0, -100]),
    }
    la = Laplace(model).fit([graph])
    params = [*model.parameters()]
    f = model(graph["x"], graph["edge_index"], graph["batch"])[:4]
    rows = []
    for entry in f.flatten():
        found = torch.autograd.grad(entry, params, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    jacobian, p = torch.stack(rows), f.detach().softmax(-1)
    inner = torch.block_diag(*(torch.diag(q) - torch.outer(q, q) for q in p))
    hessian = jacobian.T @ inner @ jacobian
    want = torch.linalg.slogdet(torch.eye(len(hessian)).double() + hessian)[1]
    goal = ExactGGN().on(la.posterior, la._data_from(None))
    assert float(goal.log_det_ratio(la.posterior)) == pytest.approx(float(want), rel=1e-9)
    for name in ("columns", "bounds", Columns(rows=1), Bracket(rows=1)):  # a mapping stays whole
        assert bool(torch.isfinite(la.evidence(name).value))
