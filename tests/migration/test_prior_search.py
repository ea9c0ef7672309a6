"""`optimize_prior_precision` in laplace-torch's words, and what of them is refused."""

from enum import Enum

import pytest
import torch
from cases import build

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted


class Word(str, Enum):
    """As laplace-torch's enumerations are."""

    GLM = "glm"
    NN = "nn"
    PROBIT = "probit"
    MARGLIK = "marglik"
    GRIDSEARCH = "gridsearch"
    SCALAR = "scalar"


def fit(name="mlp-tanh", **options):
    case = build(name)
    return Laplace(case.model, case.likelihood, **options).fit(case.batches), case


def nll(la, x, y):
    """Of the probit predictive, by its definition on the network's outputs."""
    predictive = la.predict(x, link_approx="probit")
    variance = predictive.covariance.diagonal(dim1=-2, dim2=-1)
    logits = la.model(x).detach() / (1 + torch.pi / 8 * variance).sqrt()
    return float(torch.nn.functional.cross_entropy(logits, y))


def test_their_grid_search():
    """The call of laplace-torch's README; the best of its candidates, looked at one by one."""
    la, case = fit()
    la.optimize_prior_precision(
        method="gridsearch",
        pred_type="glm",
        link_approx="probit",
        val_loader=[(case.x, case.y)],
        log_prior_prec_min=-1,
        log_prior_prec_max=2,
        grid_size=7,
    )
    found = la.prior_precision.clone()
    candidates = 10.0 ** torch.linspace(-1, 2, 7, dtype=torch.float64)
    losses = []
    for delta in candidates:
        la.prior_precision = delta
        losses.append(nll(la, case.x, case.y))
    best = candidates[losses.index(min(losses))]
    torch.testing.assert_close(found, best.expand_as(found))


@pytest.mark.slow
def test_the_base_of_the_grid_and_its_defaults():
    """A hundred candidates from base^-4 to base^4, whatever of it is given."""
    two, case = fit()
    given = {"method": "gridsearch", "link_approx": "probit", "val_loader": case.batches}
    two.optimize_prior_precision(log_prior_prec_base=2.0, **given)
    other, _ = fit()
    grid = 2.0 ** torch.linspace(-4, 4, 100, dtype=torch.float64)
    other.optimize_prior_precision(grid=grid.tolist(), **given)
    assert torch.equal(two.prior_precision, other.prior_precision)
    exponent = two.prior_precision[0].log2() * 99 / 8 + 49.5
    torch.testing.assert_close(exponent, exponent.round())


@pytest.mark.parametrize("link", ["bridge", "centred", "auto", None])
def test_the_link_decides_what_is_scored(link):
    """As predictions by that link are: probit's optimum is not theirs by definition."""
    la, case = fit()
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    data = (case.x, case.y)
    la.optimize_prior_precision("glm", "gridsearch", link_approx=link, val_loader=[data], grid=grid)
    found = la.prior_precision[0].item()
    losses = []
    for delta in grid:
        la.prior_precision, la.posterior_scale = delta, 1.0
        probs = la(case.x, link_approx=link or "auto")
        losses.append(float(-probs[torch.arange(len(probs)), case.y].log().mean()))
    assert found == grid[losses.index(min(losses))]


def test_their_search_by_the_evidence():
    """One precision for all, begun where they say; enumerations, and their first argument first."""
    la, _ = fit()
    assert la.prior_precision.numel() > 1
    got = la.optimize_prior_precision(
        Word.GLM, Word.MARGLIK, init_prior_prec=0.3, prior_structure=Word.SCALAR, progress_bar=True
    )
    assert got is la and la.prior_structure == "scalar" and la.prior_precision.numel() == 1
    own, _ = fit(prior_structure="scalar", prior_precision=0.3)
    own.optimize_prior()
    assert torch.equal(la.prior_precision, own.prior_precision)
    torch.testing.assert_close(la.log_marginal_likelihood(), own.log_marginal_likelihood())
    best = float(la.log_marginal_likelihood())
    for factor in (0.97, 1.03):
        assert float(own.log_marginal_likelihood(la.prior_precision * factor)) < best


def test_another_structure_is_kept(tmp_path):
    """By later fits, and by files."""
    la, case = fit("mlp-tanh", hessian_structure="diag")
    la.optimize_prior_precision(prior_structure="diag")
    assert la.prior_precision.numel() == sum(p.numel() for p in case.model.parameters())
    again = la.fit(case.batches).prior_precision
    assert torch.equal(again, la.prior_precision)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", case.model)
    assert loaded.prior_structure == "diag" and torch.equal(loaded.prior_precision, again)


def test_without_their_words_it_is_optimize_prior():
    one, _ = fit()
    two, _ = fit()
    one.optimize_prior("mackay", n_steps=3)
    two.optimize_prior_precision("mackay", n_steps=3)
    assert torch.equal(one.prior_precision, two.prior_precision)


def test_verbose_prints(capsys):
    la, _ = fit()
    la.optimize_prior_precision(verbose=True)
    assert f"{la.prior_precision[0]:.2f}"[:3] in capsys.readouterr().out


@pytest.mark.parametrize("first", ["glm", "gridsearch"])
def test_a_progress_bar_over_the_candidates(first, capsys):
    la, case = fit()
    given = {"val_loader": case.batches, "grid": [1.0, 2.0]}
    la.optimize_prior_precision(first, "gridsearch", progress_bar=True, **given)
    assert "prior precision" in capsys.readouterr().err


REFUSED = {
    "lr": ({"lr": 0.1}, "lr: .*n_steps and tolerance"),
    "loss": ({"loss": abs}, r"loss: .*optimize_prior\(objective=...\)"),
    "sampled": ({"method": "gridsearch", "pred_type": Word.NN}, "pred_type: .*got 'nn'.*'glm'"),
    "draws": ({"method": "gridsearch", "link_approx": "mc"}, "link_approx: .*link_approx='auto'"),
    "mode": ({"method": "gridsearch", "link_approx": "mode"}, "does not depend on δ"),
    "a grid twice": ({"method": "gridsearch", "grid": [1.0], "grid_size": 3}, "grid_size: says"),
    "a grid for the evidence": ({"grid_size": 3}, "grid_size: .*method='gridsearch'"),
    "half a grid": ({"method": "gridsearch", "grid_size": 2.5}, "grid_size: not a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_words_that_cannot_be_meant(name):
    """A TypeError that names ours; nothing has changed."""
    given, message = REFUSED[name]
    la, case = fit()
    before = dict(vars(la))
    with pytest.raises(InvalidType, match=message):
        la.optimize_prior_precision(val_loader=case.batches, prior_structure="scalar", **given)
    assert vars(la) == before


WRONG = {
    "method": {"method": "cv"},
    "pred_type": {"pred_type": "gp"},
    "link_approx": {"method": "gridsearch", "link_approx": "bridge_norm"},
    "prior_structure": {"prior_structure": "kron"},
    "prior_precision": {"prior_structure": "scalar", "init_prior_prec": -1.0},
    "grid_size": {"method": "gridsearch", "grid_size": 0},
    "val_loader": {"method": "gridsearch", "val_loader": None, "prior_structure": "scalar"},
    "objective": {"method": "gridsearch", "objective": "kron", "prior_structure": "scalar"},
    "tolerance": {"method": "gridsearch", "tolerance": 1e-3, "grid": [1.0, 2.0]},
}


@pytest.mark.parametrize("where", WRONG)
def test_values_out_of_range_change_nothing(where):
    la, case = fit()
    before = dict(vars(la))
    with pytest.raises(InvalidValue, match=f"^{where}"):
        la.optimize_prior_precision(**{"val_loader": case.batches, **WRONG[where]})
    assert vars(la) == before


def test_a_structure_within_layers_needs_another_curvature():
    la, _ = fit()
    with pytest.raises(InvalidValue, match="does not commute with Kronecker factors"):
        la.optimize_prior_precision(prior_structure="diag")
    assert la.prior_structure == "layerwise"


def test_before_the_fit():
    case = build("mlp-tanh")
    la = Laplace(case.model)
    for given in ({}, {"prior_structure": "scalar"}, {"method": "gridsearch", "val_loader": []}):
        with pytest.raises(NotFitted):
            la.optimize_prior_precision(**given)
    assert la.prior_structure == "layerwise"
