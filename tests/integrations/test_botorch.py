"""`LaplaceModel` against dense algebra, finite differences and BoTorch's own functions."""

import pytest
import torch
from posterior import dense
from torch import nn

from kfac_laplace import Laplace, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue, NotFitted, UnsupportedUse

pytest.importorskip("botorch")
from botorch.acquisition import qKnowledgeGradient, qLogExpectedImprovement
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.generation import MaxPosteriorSampling
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from botorch.test_functions import Branin

from kfac_laplace.integrations.botorch import LaplaceModel

# The same algebra in another order, in float64.
TOL = {"rtol": 1e-8, "atol": 1e-9}


@pytest.fixture(params=["kron", "diag", "full"])
def several(request):
    """A posterior of a network with several outputs, at κ = 1.7, and its case."""
    la, case = dense.fit("mlp-regression", hessian_structure=request.param, sigma_noise=0.6)
    la.posterior_scale = 1.7
    return la, case


def single(structure="kron", d=1, **options):
    """A posterior over a function of d inputs, and its data."""
    torch.manual_seed(0)
    x = torch.rand(9, d).double()
    y = (5 * x).sin().sum(1, keepdim=True)
    net = nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    options = {"sigma_noise": 0.2, "prior_precision": 0.5, **options}
    la = Laplace(net, "regression", hessian_structure=structure, **options)
    return la.fit([(x, y)]), x, y


def weights(la, case, x):
    """f (n k), J (n k, P) at x and Σ (P, P), dense: outputs of a point behind one another."""
    case.model.eval()
    j = dense.jacobian(la, case, x).flatten(0, 1)
    precision = dense.precision(la, case.model, float(la.sigma_noise))
    sigma = float(la.posterior_scale) * torch.linalg.inv(precision)
    return case.model(x).detach().flatten(), j, sigma


def batches(case, *shape):
    torch.manual_seed(1)
    return torch.randn(*shape, case.x.shape[-1]).double()


def test_posteriors_are_those_of_the_dense_linearised_process(several):
    la, case = several
    model, x = LaplaceModel(la), batches(case, 2, 3)
    m = model.num_outputs
    found = model.posterior(x)
    noisy = model.posterior(x, observation_noise=True)
    for b in range(2):
        f, j, sigma = weights(la, case, x[b])
        torch.testing.assert_close(found.mean[b].flatten(), f, **TOL)
        want = j @ sigma @ j.mT
        covariance = found.distribution.covariance_matrix[b]
        torch.testing.assert_close(covariance, want, **TOL)
        want_noisy = want + 0.36 * torch.eye(3 * m).double()
        torch.testing.assert_close(noisy.distribution.covariance_matrix[b], want_noisy, **TOL)
        torch.testing.assert_close(found.variance[b].flatten(), want.diagonal(), **TOL)


def test_with_gradients_the_same_comes_out(several):
    la, case = several
    model, x = LaplaceModel(la), batches(case, 2, 3)
    with torch.no_grad():
        plain = model.posterior(x)
    found = model.posterior(x.clone().requires_grad_())
    torch.testing.assert_close(found.mean, plain.mean, **TOL)
    torch.testing.assert_close(
        found.distribution.covariance_matrix, plain.distribution.covariance_matrix, **TOL
    )


def test_outputs_and_shapes(several):
    la, case = several
    model, x = LaplaceModel(la), batches(case, 4, 2, 3)
    whole = model.posterior(x)
    assert whole.mean.shape == (4, 2, 3, model.num_outputs)
    assert model.batch_shape == torch.Size()
    noise = torch.linspace(0.1, 0.3, model.num_outputs).double()
    chosen = model.posterior(x, output_indices=[1], observation_noise=noise.expand(3, -1))
    torch.testing.assert_close(chosen.mean, whole.mean[..., 1:2], **TOL)
    torch.testing.assert_close(chosen.variance, whole.variance[..., 1:2] + noise[1], **TOL)
    assert model.subset_output([1]).num_outputs == 1
    coefficients = torch.ones(model.num_outputs).double()
    scalar = model.posterior(x, posterior_transform=ScalarizedPosteriorTransform(coefficients))
    torch.testing.assert_close(scalar.mean[..., 0], whole.mean.sum(-1), **TOL)


def test_conditioning_is_bayes_rule_in_weights(several):
    """P' = P/κ + JᵀN⁻¹J; the shift of the weights is P'⁻¹ Jᵀ N⁻¹ (y − f)."""
    la, case = several
    model = LaplaceModel(la)
    seen, asked = batches(case, 5), batches(case, 4) + 0.3
    m = model.num_outputs
    y = torch.linspace(-1, 1, 5 * m).double().reshape(5, m)
    f, j, sigma = weights(la, case, seen)
    sharper = torch.linalg.inv(torch.linalg.inv(sigma) + j.mT @ j / 0.36)
    shift = sharper @ j.mT @ (y.flatten() - f) / 0.36
    g, k, _ = weights(la, case, asked)
    at_once = model.condition_on_observations(seen, y)
    in_turn = model.condition_on_observations(seen[:2], y[:2])
    in_turn = in_turn.condition_on_observations(seen[2:], y[2:], noise=torch.full_like(y[2:], 0.36))
    for conditioned in (at_once, in_turn):
        found = conditioned.posterior(asked)
        torch.testing.assert_close(found.mean.flatten(), g + k @ shift, **TOL)
        covariance = found.distribution.covariance_matrix
        torch.testing.assert_close(covariance, k @ sharper @ k.mT, **TOL)
    torch.testing.assert_close(model.posterior(asked).mean.flatten(), g, **TOL)  # as it was


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_what_was_conditioned_stays_at_its_hyperparameters(structure):
    """Features at others would have no covariance with those that were observed."""
    la, x, y = single(structure)
    told = LaplaceModel(la).condition_on_observations(x[:4], y[:4] + 1)
    before = told.posterior(x, observation_noise=True)
    mean, variance = before.mean.clone(), before.variance.clone()
    la.prior_precision, la.sigma_noise, la.posterior_scale = 5.0, 0.9, 2.0
    la.fit([(x, 2 * y)])
    after = told.posterior(x, observation_noise=True)
    torch.testing.assert_close(after.mean, mean, **TOL)
    torch.testing.assert_close(after.variance, variance, **TOL)
    anew = LaplaceModel(la).condition_on_observations(x[:4], y[:4] + 1).posterior(x)
    assert not torch.allclose(anew.mean, mean, rtol=1e-3)


def test_fantasies_are_as_many_models(several):
    la, case = several
    model, x, asked = LaplaceModel(la), batches(case, 2, 3), batches(case, 4)
    sampler = SobolQMCNormalSampler(torch.Size([5]), seed=0)
    fantasies = model.fantasize(x, sampler)
    assert fantasies.batch_shape == (5, 2)
    found = fantasies.posterior(asked)
    assert found.mean.shape == (5, 2, 4, model.num_outputs)
    y = sampler(model.posterior(x, observation_noise=True))
    for i, b in ((0, 0), (4, 1)):
        alone = model.condition_on_observations(x[b], y[i, b]).posterior(asked)
        torch.testing.assert_close(found.mean[i, b], alone.mean, **TOL)
        torch.testing.assert_close(found.variance[i, b], alone.variance, **TOL)


def test_transforms():
    """X in units of its own, posteriors in units of the targets before they were standardised."""
    la, x, y = single(d=2)
    bounds = torch.tensor([[0.0, 10.0], [2.0, 30.0]]).double()
    normalize, standardize = Normalize(2, bounds=bounds), Standardize(1)
    targets = 3 + 7 * y
    standardize(targets)
    model = LaplaceModel(la, input_transform=normalize, outcome_transform=standardize)
    assert model.train() is model and model.training and model.eval() is model
    inner = LaplaceModel(la)
    raw, spread = bounds[0] + (bounds[1] - bounds[0]) * x, float(targets.std())
    found, plain = model.posterior(raw), inner.posterior(x)
    torch.testing.assert_close(found.mean, float(targets.mean()) + spread * plain.mean, **TOL)
    torch.testing.assert_close(found.variance, spread**2 * plain.variance, **TOL)
    seen = model.condition_on_observations(raw, targets).posterior(raw)
    same = inner.condition_on_observations(x, (targets - targets.mean()) / spread).posterior(x)
    torch.testing.assert_close(seen.mean, float(targets.mean()) + spread * same.mean, **TOL)


def test_the_network_is_left_alone():
    la, x, _ = single()
    la.model.train()
    model = LaplaceModel(la)
    assert list(model.parameters()) == [] and list(model.state_dict()) == []
    model.eval().posterior(x[None].clone().requires_grad_()).mean.sum().backward()
    assert la.model.training
    assert all(p.grad is None for p in la.model.parameters())


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("q", [1, 2])
def test_slopes_of_acquisition_functions(structure, q):
    la, x, y = single(structure, d=2)
    model = LaplaceModel(la)
    asked = torch.tensor([[[0.3, 0.9], [0.8, 0.1]], [[0.5, 0.4], [0.1, 0.7]]]).double()[:, :q]
    if q == 1:
        acquisition = LogExpectedImprovement(model, y.max())
    else:
        sampler = SobolQMCNormalSampler(torch.Size([8]), seed=0)
        acquisition = qLogExpectedImprovement(model, y.max(), sampler=sampler)
    assert torch.autograd.gradcheck(acquisition, (asked.requires_grad_(),))


def test_slopes_through_fantasies():
    la, x, _ = single()
    sampler = SobolQMCNormalSampler(torch.Size([2]), seed=0)
    gradient = qKnowledgeGradient(LaplaceModel(la), 2, sampler=sampler)
    asked = torch.tensor([[[0.2], [0.5], [0.9]]]).double().requires_grad_()
    assert torch.autograd.gradcheck(gradient, (asked,))


@pytest.mark.parametrize("d", [1, 2])
def test_acquisition_functions_are_maximised(d):
    """As high as the best point of a fine grid, up to the grid's own coarseness."""
    la, x, y = single(d=d)
    model, bounds = LaplaceModel(la), torch.stack([torch.zeros(d), torch.ones(d)]).double()
    acquisition = LogExpectedImprovement(model, y.max())
    torch.manual_seed(0)
    best, value = optimize_acqf(
        acquisition, bounds, q=1, num_restarts=3, raw_samples=32, options={"maxiter": 30}
    )
    axis = torch.linspace(0, 1, 41).double()
    grid = torch.cartesian_prod(*[axis] * d).reshape(-1, 1, d)
    with torch.no_grad():
        assert value >= acquisition(grid).max() - 1e-6
    assert best.shape == (1, d) and bool(((best >= 0) & (best <= 1)).all())
    pair, _ = optimize_acqf(
        qLogExpectedImprovement(model, y.max()),
        bounds, q=2, num_restarts=2, raw_samples=8, options={"maxiter": 5},
    )  # fmt: skip
    assert pair.shape == (2, d)


# A smooth network's covariance at many points is singular to rounding; BoTorch says so.
@pytest.mark.filterwarnings("ignore:A not p.d., added jitter of 1.0e-08")
def test_thompson_sampling_draws_anew_each_time():
    la, x, _ = single(prior_precision=0.05)
    model, candidates = LaplaceModel(la), torch.linspace(-1, 2, 40).double()[:, None]
    torch.manual_seed(0)
    choose = MaxPosteriorSampling(model, replacement=False)
    with torch.no_grad():
        chosen = {float(choose(candidates, 1)) for _ in range(12)}
        draws = model.posterior(candidates).rsample(torch.Size([4000]))[..., 0]
    assert len(chosen) > 3
    # 4,000 draws: standard errors of a variance are 2.2 %.
    wanted = model.posterior(candidates).variance[:, 0]
    torch.testing.assert_close(draws.var(0), wanted, rtol=0.12, atol=1e-6)


def test_single_precision_networks_answer_in_the_dtype_of_the_points():
    la, x, y = single()
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    small = Laplace(net, "regression").fit([(x.float(), y.float())])
    found = LaplaceModel(small).posterior(x.requires_grad_())
    assert found.mean.dtype == found.variance.dtype == torch.float64


def test_pieces_under_a_small_budget_change_nothing():
    la, x, _ = single()
    few, _, _ = single(memory_budget=1)
    whole, pieces = LaplaceModel(la).posterior(x), LaplaceModel(few).posterior(x)
    torch.testing.assert_close(pieces.variance, whole.variance, **TOL)


def test_what_is_no_process_is_refused():
    la, x, y = single()
    with pytest.raises(InvalidType, match="not a Laplace posterior"):
        LaplaceModel(la.model)
    with pytest.raises(NotFitted):
        LaplaceModel(Laplace(la.model, "regression"))
    labels = Laplace(la.model, "binary").fit([(x, (y > 0).double())])
    with pytest.raises(UnsupportedUse, match="only a regression"):
        LaplaceModel(labels)
    model = LaplaceModel(la)
    with pytest.raises(InvalidValue, match="points are rows"):
        model.posterior(x[0])
    with pytest.raises(InvalidValue, match="no such outputs"):
        model.subset_output([1])
    with pytest.raises(InvalidValue, match="a row for each point"):
        model.condition_on_observations(x, y[:2])
    with pytest.raises(InvalidValue, match="a row for each point"):
        model.condition_on_observations(x.expand(4, *x.shape), y.expand(5, *y.shape))
    with pytest.raises(InvalidValue, match="a variance for each observation"):
        model.condition_on_observations(x, y, noise=torch.ones(7, 1))
    with pytest.raises(InvalidValue, match="must be positive"):
        model.condition_on_observations(x, y, noise=torch.zeros_like(y))
    with pytest.raises(InvalidType, match="no such argument"):
        model.condition_on_observations(x, y, rank=3)


def branin_model(x, y):
    """A network trained on these data, at a fixed noise and precision."""
    standardize = Standardize(1)
    z, _ = standardize(y)
    net = nn.Sequential(
        nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
    ).double()
    la, *_ = marglik_training(
        net, [(x, z)], "regression", "full",
        n_epochs=200, optimizer_kwargs={"lr": 2e-2},
        sigma_noise_init=0.1, prior_prec_init=0.3, n_epochs_burnin=201,
    )  # fmt: skip
    return LaplaceModel(la, outcome_transform=standardize)


@pytest.mark.slow
def test_a_closed_loop_beats_random_search_on_branin():
    """18 evaluations, of which 6 are random, find more than four searches in five by 18."""
    torch.manual_seed(0)
    branin = Branin(negate=True).to(torch.float64)
    low, high = branin.bounds
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    x = torch.rand(6, 2).double()
    y = branin(low + (high - low) * x)[:, None]
    for _ in range(12):
        acquisition = LogExpectedImprovement(branin_model(x, y), y.max())
        chosen, _ = optimize_acqf(
            acquisition, bounds, q=1, num_restarts=4, raw_samples=64, options={"maxiter": 30}
        )
        x, y = torch.cat([x, chosen]), torch.cat([y, branin(low + (high - low) * chosen)[:, None]])
    source = torch.Generator().manual_seed(0)
    rivals = torch.rand(1000, 18, 2, generator=source, dtype=torch.float64)
    found = branin(low + (high - low) * rivals).amax(1)
    assert (y.max() > found).double().mean() > 0.8
