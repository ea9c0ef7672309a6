"""Each likelihood by its name through everything that a fitted posterior and a tuner do."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case
from laws import seeded_case
from likelihoods.losses import STRUCTURES
from posterior import dense
from torch import nn

from kfac_laplace import Curvature, Laplace, Likelihood, MarglikTuner, StudentT, marglik_training
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import NAMED
from kfac_laplace.posterior.calibrate.leave_one_out import leave_one_out_points

NAMES = ("poisson", "studentt", "heteroscedastic")
SIGMA = 0.6
each = pytest.mark.parametrize("name", NAMES)
#: Preferences show rewards, two for each label, and answer some questions in another way.
every = pytest.mark.parametrize("name", (*NAMES, "reward_modeling"))


def width(name: str) -> int:
    """Outputs for each target."""
    return 2 if name in ("heteroscedastic", "reward_modeling") else 1


def example(name: str, targets: int = 2, tokens: bool = False) -> Case:
    """A small net whose targets are draws from its own outputs; of preferences one each."""
    shape = (5, 4) if tokens else (4,)
    targets = 1 if name == "reward_modeling" else targets
    net = nn.Sequential
    plain = seeded_case(
        lambda: net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, targets * width(name))), shape
    )
    likelihood = NAMED[name]()
    output = plain.model(plain.x).detach()
    f = likelihood.align(output, -1)
    y = likelihood.sample(f, torch.Generator().manual_seed(4))
    y = y.reshape(*output.shape[:-1], *(() if name == "reward_modeling" else (targets,)))
    batches = list(zip(plain.x.split((4, 3)), y.split((4, 3)), strict=True))
    return Case(plain.model, name, batches)


def fit(case: Case, **options) -> Laplace:
    return Laplace(case.model, case.likelihood, **options).fit(case.batches)


def noise(name: str) -> dict[str, float]:
    return {"sigma_noise": SIGMA} if name == "studentt" else {}


def dense_curvature(case: Case, likelihood: Likelihood):
    """Jacobians (n, k, P), curvature (n, k, k) at sigma = 1 of the outputs."""
    output = case.model(case.x)
    names = [name for name, _ in case.model.named_parameters()]
    j = oracles.parameter_jacobian(output.flatten(), case.model, names)
    by_row = likelihood.hessian(likelihood.align(output.detach(), -1))  # (n, t, c, c)
    hessian = torch.stack([torch.block_diag(*rows) for rows in by_row])
    return j.reshape(len(output), -1, j.shape[-1]), hessian


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("reward_modeling", False), *((n, tokens) for tokens in (False, True) for n in NAMES)],
)
def test_full_curvature_and_evidence_equal_dense_algebra(name, tokens):
    case = example(name, tokens=tokens)
    la = fit(case, hessian_structure="full", prior_precision=0.7, temperature=0.5, **noise(name))
    j, hessian = dense_curvature(case, la.likelihood)
    want = torch.einsum("nkp,nkl,nlq->pq", j, hessian, j)
    got = la.curvature.blocks["full"].dense()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    f = la.likelihood.align(case.model(case.x).detach(), -1)
    y = la.likelihood.align_target(case.y, f)
    log_likelihood = la.likelihood.log_prob(f, y, torch.tensor(float(la.sigma_noise))).sum()
    torch.testing.assert_close(la.log_likelihood, log_likelihood)
    evidence = oracles.evidence(
        log_likelihood,
        want,
        dense.theta(la, case.model),
        dense.delta(la, case.model),
        sigma=float(la.sigma_noise),
        temperature=0.5,
    )
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)


@every
def test_leave_one_out_moments_equal_dense_algebra(name):
    """f + S g and S = J (P - Jᵀ H J)^-1 Jᵀ with g at the noise of the fit, by autograd."""
    case = example(name)
    la = fit(case, hessian_structure="full", prior_precision=0.7, temperature=0.5, **noise(name))
    sigma = la.sigma_noise
    points = leave_one_out_points(la.posterior, case.batches, "labels", seed=0)
    j, hessian = dense_curvature(case, la.likelihood)
    hessian = hessian / (sigma**2 * 0.5)
    f = case.model(case.x).detach()[:, None].requires_grad_()
    loss = -la.likelihood.log_prob(f, case.y[:, None], sigma).sum() / 0.5
    (gradient,) = torch.autograd.grad(loss, f)
    precision = dense.precision(la, case.model, sigma, 0.5)
    for n in range(len(f)):
        own = j[n].T @ hessian[n] @ j[n]
        covariance = j[n] @ torch.linalg.solve(precision - own, j[n].T)
        want = f[n].detach().flatten() + covariance @ gradient[n].flatten()
        torch.testing.assert_close(points.mean[n].flatten(), want, rtol=1e-8, atol=1e-8)


@every
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher", ["exact", "hybrid", "mc", "empirical"])
def test_every_estimator_and_structure_predicts(name, structure, fisher):
    case = example(name)
    la = fit(case, hessian_structure=structure, fisher=fisher, **noise(name))
    before = float(la.log_marginal_likelihood())
    assert float(la.optimize_prior().log_marginal_likelihood()) >= before
    mean = la.predict(case.x).mean
    assert mean.shape == (7, 2) and torch.isfinite(mean).all()


@each
@pytest.mark.parametrize("targets", [1, 2])
def test_every_question_has_an_answer(name, targets):
    case = example(name, targets)
    la = fit(case, **noise(name))
    for options in (
        {},
        {"link_approx": "mc"},
        {"pred_type": "linear", "n_samples": 5},
        {"pred_type": "nn", "n_samples": 5},
    ):
        predictive = la.predict(case.x, **options)
        assert predictive.mean.shape == case.y.shape
        assert predictive.entropy.shape == predictive.epistemic.shape == (7,)
        assert (predictive.epistemic >= 0).all() and torch.isfinite(predictive.entropy).all()
        assert predictive.distribution().log_prob(case.y).shape == (7,)
        assert torch.equal(la(case.x, **options), predictive.mean)
    draws = la.predictive_samples(case.x, 6)
    assert draws.shape == (6, *case.y.shape) and torch.isfinite(draws).all()
    with pytest.raises(InvalidValue, match="no class probabilities"):
        _ = la.predict(case.x).probs
    with pytest.raises(InvalidValue, match="joint"):
        la(case.x, joint=True)


@every
def test_scales_and_priors_by_validation(name):
    case = example(name)
    la = fit(case, **noise(name))
    evidence = float(la.log_marginal_likelihood())
    for loader, method in ((None, "loo"), (case.batches, "validation")):
        kappa = float(la.calibrate(loader, method).posterior_scale)
        assert 0 <= kappa < 1000 and float(la.log_marginal_likelihood()) == evidence
    la.optimize_prior("gridsearch", val_loader=case.batches)
    assert torch.isfinite(la.predict(case.x).mean).all()


@every
def test_the_scale_of_one_output_is_the_best_by_its_own_distribution(name):
    """Loss by `distribution().log_prob`; no kappa on a grid does better."""
    case = example(name, targets=1)
    la = fit(case, **noise(name)).calibrate(case.batches, method="validation")

    def loss() -> float:
        return -float(la.predict(case.x).distribution().log_prob(case.y).mean())

    best = loss()
    for kappa in (0.0, *torch.logspace(-3, 2, 11).tolist()):
        la.posterior_scale = kappa
        assert best <= loss() + 1e-4  # the search stops within 1e-4 nats


@every
def test_files_and_states_hold_the_likelihood(name, tmp_path):
    case = example(name)
    la = fit(Case(case.model, case.likelihood, case.batches[:1]), **noise(name))
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", case.model)
    assert type(loaded.likelihood) is NAMED[name]
    for posterior in (la, loaded):
        posterior.fit(case.batches[1:], override=False)
    whole = fit(case, **noise(name))
    for posterior in (la, loaded):
        torch.testing.assert_close(
            posterior.log_marginal_likelihood(), whole.log_marginal_likelihood()
        )
    torch.testing.assert_close(loaded(case.x), whole(case.x))


@every
def test_curvatures_merge(name):
    case = example(name)
    parts = [Curvature(case.model, name).fit([batch]) for batch in case.batches]
    whole = Curvature(case.model, name).fit(case.batches)
    merged = parts[0].merge(parts[1])
    torch.testing.assert_close(merged.statistic, whole.statistic)
    for key, block in whole.blocks.items():
        torch.testing.assert_close(merged.blocks[key].dense(), block.dense())


def test_degrees_of_freedom_are_in_the_file_and_bind(tmp_path):
    case = example("studentt")
    la = Laplace(case.model, StudentT(df=7)).fit(case.batches)
    la.save(tmp_path / "posterior.pt")
    assert Laplace.load(tmp_path / "posterior.pt", case.model).likelihood.options() == {"df": 7.0}
    with pytest.raises(InvalidValue, match="likelihood"):
        Laplace(case.model, "studentt").load_state_dict(la.state_dict())


@pytest.mark.slow
@each
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_training_by_the_evidence(name, fisher):
    case = example(name, targets=1)
    with torch.no_grad():  # away from the weights that the targets came from
        for p in case.model.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(8)))
    la, _, margliks, losses = marglik_training(
        case.model, case.batches, name, fisher=fisher, n_epochs=60, n_hypersteps=5
    )
    assert losses[-1] < losses[0] and margliks[-1] < margliks[0]
    assert torch.isfinite(la(case.x)).all()


@every
def test_the_tuners_loss_is_the_negative_log_joint(name):
    case = example(name)
    tuner = MarglikTuner(case.model, name, 7, prior_precision=2.5, temperature=0.5, **noise(name))
    f = case.model(case.x)
    likelihood = NAMED[name]()
    sigma = torch.tensor(noise(name).get("sigma_noise", 1.0), dtype=torch.float64)
    want = -likelihood.log_prob(f[:, None], case.y[:, None], sigma).mean() / 0.5
    want = want + 2.5 * sum(p.square().sum() for p in case.model.parameters()) / (2 * 7)
    torch.testing.assert_close(tuner.loss(f, case.y), want)
    record = tuner.step(case.batches)
    assert record.log_likelihood == pytest.approx(float(tuner.laplace(case.batches).log_likelihood))


@pytest.mark.slow
def test_the_evidence_learns_the_noise_and_outliers_move_it_little():
    """Sines with noise of 0.3 and one value in ten off by 5: a Gaussian takes them for noise."""
    draw = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 300, dtype=torch.float64)[:, None]
    features = torch.cat([torch.sin(k * x) for k in (1, 2, 3)], 1)
    y = features[:, :1] + 0.3 * torch.randn(300, 1, dtype=torch.float64, generator=draw)
    y[::10] += 5 * torch.randn(30, 1, dtype=torch.float64, generator=draw)
    found = {}
    for name in ("regression", "studentt"):
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        la, _, _, _ = marglik_training(
            model, [(features, y)], name, n_epochs=150, optimizer_kwargs={"lr": 0.05}
        )
        la.optimize_prior()
        sigma = la.sigma_noise.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=sigma), sigma)
        assert float((gradient * sigma).detach().abs()) < 1e-3  # nats per unit of log sigma
        found[name] = (float(la.sigma_noise), float(la.log_marginal_likelihood()))
    assert found["regression"][0] > 1 and 0.2 < found["studentt"][0] < 0.5
    assert found["studentt"][1] > found["regression"][1] + 50


def test_mackay_leaves_the_noise_of_student_t_alone():
    la = fit(example("studentt"), sigma_noise=SIGMA)
    with pytest.raises(UnsupportedUse, match="StudentT: .*method='marglik'"):
        la.optimize_prior("mackay")
    la.optimize_prior("mackay", fix_sigma_noise=True)
    assert float(la.sigma_noise) == pytest.approx(SIGMA)


@pytest.mark.slow
def test_a_network_learns_where_the_noise_is():
    """Noise of 0.1 on the left and of 1 on the right."""
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(400, 1, dtype=torch.float64, generator=draw) * 2 - 1
    true = torch.where(x > 0, 1.0, 0.1)
    y = 2 * x + true * torch.randn(400, 1, dtype=torch.float64, generator=draw)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    la, _, _, _ = marglik_training(
        model, [(x, y)], "heteroscedastic", n_epochs=200, optimizer_kwargs={"lr": 0.05}
    )
    at = torch.tensor([[-0.6], [0.6]], dtype=torch.float64)
    deviation = la.predict(at).distribution().stddev.flatten()
    assert float(deviation[0]) < 0.4 < 0.7 < float(deviation[1]) < 1.4  # still learning
    assert (la(at).flatten() - torch.tensor([-1.2, 1.2])).abs().max() < 0.3
