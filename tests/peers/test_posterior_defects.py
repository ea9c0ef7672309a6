"""What laplace-torch 0.3 gets wrong after the curvature, each run against it."""

import pytest
import torch
from peers import peer
from torch.utils.data import DataLoader, IterableDataset

from kfac_laplace import KfacLaplaceError, Laplace


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def slope(evidence, at=-0.5, step=1e-5):
    """d evidence / d log sigma by central differences."""
    ends = [torch.tensor(at + s, dtype=torch.float64).exp() for s in (step, -step)]
    with torch.no_grad():
        return (evidence(ends[0]) - evidence(ends[1])) / (2 * step)


def autograd_slope(evidence, at=-0.5):
    log_sigma = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    evidence(log_sigma.exp()).backward()
    return log_sigma.grad


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
def test_kron_evidence_depends_on_sigma():
    """The peer detaches the noise in the Kronecker scale: half of the gradient is lost."""
    model = peer.mlp(outputs=2)
    x, y = peer.data("regression", 5, outputs=2)
    delta = torch.tensor(1.0, dtype=torch.float64)
    theirs = peer.fit(model, "regression", peer.loader(x, y))
    ours = Laplace(model, "regression", joint_bias=False).fit(peer.loader(x, y))

    def evidence_of(la):
        return lambda sigma: la.log_marginal_likelihood(delta, sigma)

    truth = slope(evidence_of(ours))
    torch.testing.assert_close(autograd_slope(evidence_of(ours)), truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope(evidence_of(theirs)), truth, rtol=1e-6, atol=1e-6)
    assert abs(autograd_slope(evidence_of(theirs)) / truth - 1) > 0.1


def test_float32_models_get_the_float64_evidence():
    """Rank-2 inputs in 32 columns and a small delta: float32 eigenvalues are off by nats."""
    x, y = peer.data("regression", 2, outputs=2, n=200)
    x, delta = 10 * x.repeat(1, 16), torch.tensor(1e-4)
    exact = peer.fit(peer.mlp(32, 8, 2), "regression", peer.loader(x, y, 200))
    expected = exact.log_marginal_likelihood(delta.double())
    model, loader = peer.mlp(32, 8, 2).float(), peer.loader(x.float(), y.float(), 200)
    theirs = peer.fit(model, "regression", loader).log_marginal_likelihood(delta)
    assert abs(theirs - expected) > 5
    ours = Laplace(model, "regression", joint_bias=False).fit(loader)
    # The sums themselves are float32: 1e-7 relative in about a hundred eigenvalues.
    assert abs(ours.log_marginal_likelihood(delta) - expected) < 1e-2


def test_n_is_what_was_seen():
    """With `drop_last` the peer scales its factors by len(dataset)."""
    model = peer.mlp()
    x, y = peer.data("classification", 5)
    dropping = peer.loader(x, y, drop_last=True)  # 21 of 24
    seen = peer.loader(x[:21], y[:21])

    def ratios(fit):
        return [fit(model, "classification", batches).log_det_ratio for batches in (dropping, seen)]

    wrong, right = ratios(peer.fit)
    assert abs(wrong - right) > 0.5
    ours = ratios(lambda m, lik, b: Laplace(m, lik).fit(b))
    torch.testing.assert_close(*ours)


class Stream(IterableDataset):
    """A data set without a length."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        yield from zip(self.x, self.y, strict=True)


def test_iterable_data_sets():
    """The peer asks for a length."""
    model = peer.mlp()
    x, y = peer.data("classification", 5)
    streaming = DataLoader(Stream(x, y), batch_size=7)
    with pytest.raises(TypeError):
        peer.fit(model, "classification", streaming)
    ours = Laplace(model, "classification").fit(streaming)
    expected = Laplace(model, "classification").fit(peer.loader(x, y))
    torch.testing.assert_close(ours.log_det_ratio, expected.log_det_ratio)


def test_nan_weights_raise_instead_of_ending_the_process():
    """The peer calls exit()."""
    model = peer.mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    x, y = peer.data("classification", 5)
    with pytest.raises(SystemExit):
        peer.fit(model, "classification", peer.loader(x, y))
    with pytest.raises(KfacLaplaceError, match="finite"):
        Laplace(model, "classification").fit(peer.loader(x, y))


def test_half_precision_weights_get_an_evidence():
    """The peer calls exit(); float64 decompositions do not care."""
    model = peer.mlp()
    x, y = peer.data("classification", 5)
    expected = Laplace(model, "classification").fit(peer.loader(x, y)).log_marginal_likelihood()
    half = peer.mlp().bfloat16()
    loader = peer.loader(x.bfloat16(), y)
    with pytest.raises(SystemExit):
        peer.fit(half, "classification", loader)
    got = Laplace(half, "classification").fit(loader).log_marginal_likelihood()
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0)  # bfloat16: 3 digits


@pytest.mark.slow
def test_function_samples_are_joint_but_not_identical_across_inputs():
    """The peer shares one noise vector across inputs: correlation 1 whatever the inputs."""
    model = peer.mlp(outputs=1)
    x, y = peer.data("regression", 5, outputs=1)
    theirs = peer.fit(model, "regression", peer.loader(x, y), "full")
    samples = theirs.functional_samples(x[:2], pred_type="glm", n_samples=500)[..., 0]
    assert torch.corrcoef(samples.T)[0, 1] > 0.999

    ours = Laplace(model, "regression", hessian_structure="full").fit(peer.loader(x, y))
    _, covariance = ours(x[:2], joint=True)
    scale = covariance.diagonal().sqrt()
    truth = (covariance / scale / scale[:, None])[0, 1]
    assert truth < 0.9
    n = 4_000
    samples = ours.functional_samples(x[:2], n, generator=generator())[..., 0]
    got = torch.corrcoef(samples.T)[0, 1]
    assert abs(got - truth) < 5 * (1 - truth**2) / n**0.5  # standard error of a correlation


@pytest.mark.parametrize("options", [{"pred_type": "glm"}, {"pred_type": "nn"}])
def test_the_generator_decides(options):
    """The peer accepts a generator in a call, and draws from the global one."""
    model = peer.mlp()
    x, y = peer.data("classification", 5)
    theirs = peer.fit(model, "classification", peer.loader(x, y))
    ours = Laplace(model, "classification").fit(peer.loader(x, y))

    def twice(la):
        calls = {"link_approx": "mc", "n_samples": 5, **options}
        return [la(x[:3], generator=generator(), **calls) for _ in range(2)]

    assert not torch.equal(*twice(theirs))
    assert torch.equal(*twice(ours))


class Fragile(torch.nn.Module):
    """Fails at the third forward pass once armed."""

    def __init__(self):
        super().__init__()
        self.linear, self.armed, self.calls = torch.nn.Linear(5, 3), False, 0

    def forward(self, x):
        self.calls += self.armed
        if self.calls > 2:
            raise ArithmeticError("third pass")
        return self.linear(x)


def test_an_exception_while_sampling_leaves_the_weights():
    """The peer leaves the sampled weights in the model."""
    x, y = peer.data("classification", 5)

    def change(fit, **options):
        model = peer.seeded(Fragile)
        la, before = fit(model), model.linear.weight.detach().clone()
        model.armed = True
        with pytest.raises(ArithmeticError):
            la(x, pred_type="nn", link_approx="mc", n_samples=5, **options)
        return (model.linear.weight.detach() - before).abs().max()

    assert change(lambda m: peer.fit(m, "classification", peer.loader(x, y), "diag")) > 0.01
    ours = change(
        lambda m: Laplace(m, "classification", hessian_structure="diag").fit(peer.loader(x, y))
    )
    assert ours == 0


def overfitted():
    """A net that a middle prior precision serves best on held-out data."""
    draw = generator(1)

    def sample(n):
        x = torch.randn(n, 2, dtype=torch.float64, generator=draw)
        noise = 0.7 * torch.randn(n, dtype=torch.float64, generator=draw)
        return x, (x[:, 0] + noise > 0).long() + (x[:, 1] > 0.5).long()

    (x, y), (x_val, y_val) = sample(40), sample(100)
    model = peer.mlp(inputs=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y), (x_val, y_val)


def nll(la, delta, x, y):
    la.prior_precision = delta
    return float(-la(x).log().gather(1, y[:, None]).mean())


def test_grid_search_starts_each_candidate_from_zero():
    """The peer's running metric is never reset: it averages over all candidates so far."""
    model, train, validation = overfitted()
    theirs = peer.fit(model, "classification", peer.loader(*train))
    val_loader = peer.loader(*validation)
    theirs.optimize_prior_precision(
        method="gridsearch", pred_type="glm", val_loader=val_loader, grid_size=9
    )
    chosen = theirs.prior_precision.clone()
    grid = torch.logspace(-4, 4, 9, dtype=torch.float64)
    best = min(grid, key=lambda delta: nll(theirs, delta, *validation))
    assert nll(theirs, chosen, *validation) > nll(theirs, best, *validation) + 0.01

    ours = Laplace(model, "classification", joint_bias=False, kfac_approx="expand")
    ours.fit(peer.loader(*train))
    ours.optimize_prior(method="gridsearch", val_loader=val_loader, grid=grid.tolist())
    found = ours.prior_precision.clone()
    assert nll(ours, found, *validation) == min(nll(ours, d, *validation) for d in grid)
