"""A likelihood of the user's own in two methods gets everything that the library's own have."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical as Labels
from torch.distributions import Distribution, MixtureSameFamily, Normal
from torch.distributions import Poisson as PoissonDistribution

import kfac_laplace
from kfac_laplace import Laplace, Likelihood, MarglikTuner, Poisson, marglik_training
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import NAMED


class Counts(Likelihood):
    """Poisson counts with log rate f, as a user writes them."""

    def distribution(self, f, sigma):
        return PoissonDistribution(f.exp())

    def hessian(self, f):
        return torch.diag_embed(f.exp())


class Ordered(Likelihood):
    """Three ordered grades: one output, two thresholds. Lambda by sums over the grades."""

    def distribution(self, f, sigma):
        below = torch.sigmoid(torch.tensor([-1.0, 1.0]).to(f) - f)  # (..., 2)
        ones = torch.ones_like(f)
        return Labels(probs=torch.cat([below, ones], -1) - torch.cat([0 * ones, below], -1))

    def hessian(self, f):
        labels = [torch.full(f.shape[:2], grade, dtype=f.dtype) for grade in range(3)]
        scores = torch.cat([self.score(f, y) for y in labels], -1)  # (n, t, 3)
        p = self.distribution(f, torch.ones(())).probs
        return (p * scores.square()).sum(-1)[..., None, None]


def data(outputs=1):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, dtype=torch.float64, generator=draw)
    rate = (x.sum(1, keepdim=True) * torch.tensor([1.0, 0.5], dtype=torch.float64)[:outputs]).exp()
    return x, torch.poisson(rate, generator=draw)


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def fitted(likelihood, outputs=1, **options):
    return Laplace(network(outputs), likelihood, **options).fit([data(outputs)])


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("fisher", ["exact", "hybrid", "empirical"])
def test_two_methods_have_the_curvature_of_closed_forms(fisher, outputs):
    """Scores by autograd and roots by eigenvectors are the written ones."""
    own, known = (fitted(k, outputs, fisher=fisher) for k in (Counts(), Poisson()))
    for name, block in known.curvature.blocks.items():
        got, want = own.curvature.blocks[name].dense(), block.dense()
        # hybrid: other signs, drawn for roots in another order, where they are more than one
        if fisher != "hybrid" or outputs == 1:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12 * float(want.abs().max()))
    torch.testing.assert_close(own.log_likelihood, known.log_likelihood)


def test_evidence_priors_and_scales_follow():
    own, known = fitted(Counts()), fitted(Poisson())
    validation = [data()]
    for la in (own, known):
        la.optimize_prior("gridsearch", val_loader=validation)
    torch.testing.assert_close(own.prior_precision, known.prior_precision, rtol=0, atol=0)
    for method in ("marglik", "mackay"):
        values = [la.optimize_prior(method).log_marginal_likelihood() for la in (own, known)]
        torch.testing.assert_close(values[0], values[1])
    for loader, method in ((None, "loo"), (validation, "validation")):
        kappas = [float(la.calibrate(loader, method).posterior_scale) for la in (own, known)]
        # the search over log kappa stops within 1e-4
        assert kappas[0] == pytest.approx(kappas[1], rel=1e-3)


def test_predictions_follow():
    own, known = fitted(Counts()), fitted(Poisson())
    x, y = data()
    torch.testing.assert_close(own(x), known(x))  # a rule of 201 points, exp(m + v/2)
    got, want = own.predict(x), known.predict(x)
    assert isinstance(got.distribution(), Distribution)
    torch.testing.assert_close(got.distribution().log_prob(y), want.distribution().log_prob(y))
    torch.testing.assert_close(got.mean, got.distribution().mean)
    assert (got.epistemic >= 0).all() and (got.epistemic <= got.entropy).all()
    with pytest.raises(InvalidValue, match="no class probabilities"):
        _ = got.probs
    for options in ({"link_approx": "mc"}, {"pred_type": "linear"}, {"pred_type": "nn"}):
        torch.testing.assert_close(own(x, n_samples=7, **options), known(x, n_samples=7, **options))
    counts = own.predictive_samples(x, 5)
    assert counts.shape == (5, 40, 1) and torch.equal(counts, counts.round())


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_tuners_loss_and_rounds_follow(outputs):
    x, y = data(outputs)
    found = []
    for kind in (Counts(), Poisson()):
        model = network(outputs)
        tuner = MarglikTuner(model, kind, 40)
        loss = tuner.loss(model(x), y)
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        found.append((loss.detach(), gradients, tuner.step([(x, y)]).evidence))
    torch.testing.assert_close(found[0], found[1])


def test_training_in_one_call():
    batches = [data()]
    la, _, margliks, _ = marglik_training(network(), batches, Counts(), n_epochs=20)
    assert margliks[-1] < margliks[0] and torch.isfinite(la(batches[0][0])).all()


def test_draws_come_from_the_generator_alone():
    la = fitted(Counts(), fisher="mc")
    x, _ = data()
    state = torch.get_rng_state()
    first, again = (
        la.predictive_samples(x, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2)
    )
    la.predict(x).entropy  # noqa: B018  # its draws are what the test is about
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    other = la.predictive_samples(x, 3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(first, other)
    again = fitted(Counts(), fisher="mc")
    for name, block in la.curvature.blocks.items():
        assert torch.equal(block.dense(), again.curvature.blocks[name].dense())


def test_a_file_takes_the_object_again(tmp_path):
    la = fitted(Counts())
    la.save(tmp_path / "counts.pt")
    with pytest.raises(InvalidValue, match="likelihood"):
        Laplace.load(tmp_path / "counts.pt", la.model)
    loaded = Laplace.load(tmp_path / "counts.pt", la.model, likelihood=Counts())
    x, _ = data()
    assert torch.equal(loaded(x), la(x))


def grades():
    x, _ = data()
    return x, (x.sum(1) > -1).long() + (x.sum(1) > 1).long()


def test_a_categorical_distribution_means_classes():
    x, y = grades()
    la = Laplace(network(), Ordered()).fit([(x, y)]).optimize_prior()
    probs = la(x)
    assert probs.shape == (40, 3)
    torch.testing.assert_close(probs.sum(1), torch.ones(40, dtype=torch.float64))
    # against Gauss-Hermite quadrature of 60 points
    z, weights = (torch.as_tensor(a) for a in _hermite(60))
    predictive = la.predict(x)
    f = predictive.mean_f[:, 0] + predictive.covariance[:, 0].sqrt() * z  # (40, 60)
    want = Ordered().distribution(f[..., None], torch.ones(())).probs  # (40, 60, 3)
    torch.testing.assert_close(probs, torch.einsum("nkc,k->nc", want, weights))
    assert isinstance(predictive.distribution(), Labels)
    torch.testing.assert_close(predictive.probs, predictive.mean)
    torch.testing.assert_close(predictive.entropy, torch.special.entr(probs).sum(1))
    assert (predictive.epistemic >= 0).all() and (predictive.epistemic < predictive.entropy).all()
    samples = la.predictive_samples(x, 6)
    assert samples.shape == (6, 40) and set(samples.unique().tolist()) <= {0, 1, 2}
    la.calibrate()
    la.calibrate([(x, y)], method="validation")
    la.optimize_prior("gridsearch", val_loader=[(x, y)])
    assert torch.isfinite(la(x)).all()


def _hermite(count):
    nodes, weights = np.polynomial.hermite.hermgauss(count)
    return nodes * 2**0.5, weights / math.pi**0.5


def test_tokens_have_one_distribution_each():
    x = torch.randn(6, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.poisson(x.sum(-1, keepdim=True).exp(), generator=torch.Generator().manual_seed(2))
    la = Laplace(network(), Counts()).fit([(x, y)])
    predictive = la.predict(x)
    assert la(x).shape == y.shape and predictive.entropy.shape == (6,)
    assert isinstance(predictive.distribution(), MixtureSameFamily)
    assert predictive.distribution().log_prob(y).shape == (6, 5)
    assert la.predictive_samples(x, 2).shape == (2, 6, 5, 1)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.full((40, 1), -1.0), "support"),
        (torch.full((40, 1), 0.5), "support"),
        (torch.full((40, 1), torch.nan), "non-finite"),
        (torch.ones(40, 2), "do not match"),
        (torch.ones(1, 40), "do not match|number of examples"),
    ],
)
def test_targets_that_cannot_be_draws_are_refused(target, says):
    with pytest.raises(InvalidValue, match=says):
        Laplace(network(), Counts()).fit([(data()[0], target.double())])


def test_integer_targets_will_do():
    x, y = data()
    la = Laplace(network(), Counts()).fit([(x, y.flatten().long())])
    assert torch.equal(la.log_likelihood, fitted(Counts()).log_likelihood)


def test_what_is_missing_is_asked_for():
    class Noisy(Counts):
        has_noise = True

    class Negative(Counts):
        def hessian(self, f):
            return -super().hessian(f)

    class Short(Counts):
        def distribution(self, f, sigma):
            return Normal(f.sum(), 1)

    with pytest.raises(UnsupportedUse, match="Noisy: .*statistic"):
        fitted(Noisy())
    with pytest.raises(InvalidValue, match="positive semi-definite"):
        fitted(Negative())
    with pytest.raises(InvalidValue, match="batch shape"):
        fitted(Short())
    with pytest.raises(TypeError, match="distribution"):
        Likelihood()


def test_nothing_outside_the_room_asks_which_likelihood_it_has():
    package = Path(kfac_laplace.__file__).parent
    kinds = {kind.__name__ for kind in NAMED.values()}
    for path in package.rglob("*.py"):
        if path.parent.name == "likelihoods" or path == package / "__init__.py":
            continue
        imports = (
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)
        )
        names = {alias.name for node in imports for alias in node.names}
        assert names.isdisjoint(kinds), path
