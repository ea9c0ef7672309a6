"""Posteriors over lookup tables: equal to the dense algebra, without a matrix of V rows."""

import subprocess
import sys

import oracles
import pytest
import torch
from laws import EXACT
from lookups import TiedWords, Translation, lookup_case, words
from posterior import dense

from kfac_laplace import Laplace
from kfac_laplace.posterior.predict.glm import output_features

TOL = {"rtol": 1e-9, "atol": 1e-10}  # float64 solves of well-conditioned P, at most 50 dimensions
N_SAMPLES = 20_000


def tied():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return words(TiedWords())


CASES = {
    "embedding": lambda: lookup_case("embedding"),
    "padding": lambda: lookup_case("padding"),
    "indexed": lambda: lookup_case("indexed"),
    "indexed-matrices": lambda: lookup_case("indexed-matrices"),
    "encoder-decoder": lambda: lookup_case("padding", Translation),
    "tied": tied,
}
everything = pytest.mark.parametrize("structure", ["kron", "diag", "full"])
everywhere = pytest.mark.parametrize("name", CASES)
settings = pytest.mark.parametrize("setting", ["expand", "reduce"])


def fit(name, **options):
    """A posterior with a precision of its own for each group, and its case."""
    case = CASES[name]()
    la = Laplace(case.model, case.likelihood, temperature=0.7, **options).fit(case.batches)
    count = la.prior_precision.numel()
    la.prior_precision = torch.linspace(0.5, 3, count, dtype=torch.float64)
    return la, case


def oracle_evidence(la, case):
    scales = {"temperature": 0.7}
    parts = dense.hessian(la, case.model), dense.theta(la, case.model), dense.delta(la, case.model)
    return oracles.evidence(dense.log_likelihood(case), *parts, **scales)


@everywhere
@settings
@everything
def test_evidence(name, setting, structure):
    la, case = fit(name, kfac_approx=setting, hessian_structure=structure)
    torch.testing.assert_close(la.log_marginal_likelihood(), oracle_evidence(la, case), **TOL)


@everywhere
@settings
@everything
def test_glm_covariance(name, setting, structure):
    """J is exact: words that repeat within an example add up before they are squared."""
    la, case = fit(name, kfac_approx=setting, hessian_structure=structure)
    j = dense.jacobian(la, case)
    precision = dense.precision(la, case.model, temperature=0.7)
    expected = j @ torch.linalg.solve(precision, j.mT)  # (n, k, k)
    torch.testing.assert_close(la.predict(case.x).covariance, expected, **TOL)
    # The other way to the same numbers: features of all inputs, by which joint draws are made.
    features = torch.cat(output_features(la.posterior, la.curvature.network.batch(case.x)), 1)
    flat = j.flatten(0, 1)
    joint = flat @ torch.linalg.solve(precision, flat.T)
    torch.testing.assert_close(features @ features.T, joint, **TOL)


@pytest.mark.parametrize("name", ["padding", "indexed-matrices", "encoder-decoder", "tied"])
@everything
def test_samples(name, structure):
    la, case = fit(name, hessian_structure=structure)
    draws = la.sample(N_SAMPLES, generator=torch.Generator().manual_seed(0))
    covariance = dense.precision(la, case.model, temperature=0.7).inverse()
    centred = draws - dense.theta(la, case.model)
    variance = covariance.diagonal()
    assert (centred.mean(0).abs() <= 5 * (variance / N_SAMPLES).sqrt()).all()
    # Var of a product of two Gaussians: S_ii S_jj + S_ij^2; five standard errors, entry by entry.
    error = ((variance[:, None] * variance + covariance**2) / N_SAMPLES).sqrt()
    assert ((centred.T @ centred / N_SAMPLES - covariance).abs() <= 5 * error).all()


@everything
@settings
def test_optimal_precisions_are_stationary(setting, structure):
    la, _ = fit("padding", kfac_approx=setting, hessian_structure=structure)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior(method="mackay")
    precision = la.prior_precision.clone().requires_grad_()
    evidence = la.log_marginal_likelihood(prior_precision=precision)
    (slope,) = torch.autograd.grad(evidence, precision)
    assert evidence.item() > before
    # In the logarithm of each precision, where a unit step changes the evidence by nats.
    assert (slope * precision).abs().max() < 1e-2


@everywhere
@everything
def test_saving_and_loading(name, structure, tmp_path):
    la, case = fit(name, hessian_structure=structure)
    la.save(tmp_path / "posterior.pt")
    loaded = Laplace.load(tmp_path / "posterior.pt", CASES[name]().model)
    assert loaded.coverage == la.coverage
    pair = [(p.log_marginal_likelihood(), p.predict(case.x).covariance) for p in (la, loaded)]
    for one, other in zip(*pair, strict=True):
        assert torch.equal(one.detach(), other.detach())


@everywhere
@everything
def test_data_added_later(name, structure):
    whole, case = fit(name, hessian_structure=structure)
    grown = Laplace(case.model, case.likelihood, temperature=0.7, hessian_structure=structure)
    grown.fit(case.batches[:1]).fit(case.batches[1:], override=False)
    grown.prior_precision = whole.prior_precision
    torch.testing.assert_close(
        grown.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=EXACT, atol=0
    )


SIZE, WIDTH = 50_000, 64
TABLE = SIZE * WIDTH * 8  # bytes of one copy of the table in float64
#: The block holds its eigenvalues, a sample the noise, the deviations and the draw, the evidence
#: the graph of an elementwise function of the eigenvalues: a few copies each.
COPIES = 25
#: The optimiser holds the graphs of two evaluations, and the allocator keeps what they freed.
COPIES_TO_OPTIMISE = 60

SCRIPT = f"""
import sys, torch
from torch import nn
from kfac_laplace import Laplace

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding({SIZE}, {WIDTH}), nn.Linear({WIDTH}, 5)

    def forward(self, x):
        return self.head(self.table(x).tanh().mean(1))

def peak():  # of this program alone: the system's count begins with the parent's memory
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

with open("/proc/self/clear_refs", "w") as counters:
    counters.write("5")

structure, optimise = sys.argv[1:]
torch.manual_seed(0)
model, x, y = Bag(), torch.randint(0, {SIZE}, (8, 32)), torch.randint(0, 5, (8,))
start = peak()
la = Laplace(model, "classification", fisher="mc", hessian_structure=structure).fit([(x, y)])
assert torch.isfinite(la.log_marginal_likelihood())
if optimise == "optimise":
    la.optimize_prior()
assert torch.isfinite(la(x)).all()
assert la.sample(1).shape == (1, {SIZE * WIDTH} + 5 * {WIDTH} + 5)
print(peak() - start)
"""


def tables_held(*arguments):
    """Peak memory of the script above a model at rest, in copies of the table."""
    run = [sys.executable, "-c", SCRIPT, *arguments]
    return int(subprocess.run(run, capture_output=True, check=True).stdout) / TABLE


def square(size):
    """Bytes of a float32 matrix with a row for each entry, in copies of the table."""
    return size**2 * 4 / TABLE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_memory_grows_with_the_table_and_not_with_its_square(structure):
    """Fit, evidence, predictive and a sample hold a bounded number of tables."""
    assert square(SIZE) > 15 * COPIES
    held = tables_held(structure, "keep")
    assert 1 < held < COPIES, f"{held:.1f} tables"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_memory_of_evidence_maximisation(structure):
    assert square(SIZE) > 5 * COPIES_TO_OPTIMISE
    held = tables_held(structure, "optimise")
    assert 1 < held < COPIES_TO_OPTIMISE, f"{held:.1f} tables"
