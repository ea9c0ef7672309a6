"""Resamples: seeded, of any chunk size, and intervals that hold the truth as often as they say."""

import pytest
import torch

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.report import bootstrap as module
from kfac_laplace.report.bootstrap import Bootstrap
from kfac_laplace.report.means import CHANCE, ClassRows


def mean(values):
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def values(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_first_entry_is_that_of_the_data():
    x = values(50)
    found = Bootstrap(20).replicates(mean(x), [50], 50)["mean"]
    assert found.shape == (21,) and float(found[0]) == pytest.approx(float(x.mean()))
    assert len(set(found.tolist())) == 21


def test_means_spread_as_theory_says():
    """The deviation of a resampled mean is s/√n; of 4000 it is known within 5 %."""
    x = values(80)
    found = Bootstrap(4000).replicates(mean(x), [80], 80)["mean"][1:]
    want = float(x.std(correction=0)) / 80**0.5
    assert float(found.std()) == pytest.approx(want, rel=0.05)


def test_seeds_and_chunks(monkeypatch):
    x = values(30)
    one = Bootstrap(50, seed=3).replicates(mean(x), [30], 30)["mean"]
    other = Bootstrap(50, seed=4).replicates(mean(x), [30], 30)["mean"]
    assert not torch.equal(one, other)
    monkeypatch.setattr(module, "CHUNK", 7 * 30)
    torch.testing.assert_close(Bootstrap(50, seed=3).replicates(mean(x), [30], 30)["mean"], one)


def test_groups_are_resampled_on_their_own():
    def figures(first, second):
        return {"sizes": torch.stack([first.sum(1), second.sum(1)], 1)}

    sizes = Bootstrap(10).replicates(figures, [4, 6], 10)["sizes"]
    assert sizes.tolist() == [[4, 6]] * 11


@pytest.mark.parametrize(("n", "resamples"), [(1, 100), (20, 0)])
def test_no_intervals_without_resamples(n, resamples):
    bootstrap = Bootstrap(resamples)
    found = bootstrap.replicates(mean(values(n)), [n], n)["mean"]
    assert bootstrap.interval("mean", found) is None
    assert bootstrap.difference("mean", found, found) is None


def held(n, truth, draw, name, **options):
    """How many of 200 intervals hold the truth."""
    hits = 0
    for seed in range(200):
        bootstrap = Bootstrap(300, seed=seed, **options)
        found = bootstrap.replicates(draw(n, seed).figures, [n], n)
        low, high = bootstrap.interval(name, found[name], found[CHANCE])
        hits += low <= truth <= high
    return hits / 200


def guesses(power):
    """Confidence c in [½, 1], right with probability c^power."""

    def draw(n, seed):
        generator = torch.Generator().manual_seed(seed)
        c = 1 - 0.5 * torch.rand(n, generator=generator, dtype=torch.float64) ** 2
        wrong = torch.rand(n, generator=generator, dtype=torch.float64) > c**power
        return ClassRows.of(torch.stack([c, 1 - c], 1), wrong.long())

    return draw


@pytest.mark.slow
@pytest.mark.parametrize(
    ("power", "name", "least"),
    [(1.0, "ece", 0.9), (1.5, "ece", 0.8), (1.5, "nll", 0.9), (1.5, "accuracy", 0.9)],
)
def test_intervals_hold_the_truth(power, name, least):
    """Of 200 intervals of 95 %; plain quantiles hold the ECE of a calibrated network in none."""
    draw = guesses(power)
    truth = float(draw(1_000_000, 10**6).figures(torch.ones(1, 1_000_000).double())[name])
    assert held(400, truth, draw, name) >= least


def test_differences_are_paired():
    """A shift common to all resamples has no spread, whatever the spread of each."""
    x = values(40)
    bootstrap = Bootstrap(200)
    found = bootstrap.replicates(
        lambda w: {"one": w @ x / w.sum(1), "other": w @ (x + 2) / w.sum(1)}, [40], 40
    )
    value, low, high = bootstrap.difference("one", found["one"], found["other"])
    assert (value, low, high) == pytest.approx((-2, -2, -2))
    low, high = bootstrap.interval("one", found["one"])
    assert high - low > 0.4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resamples": -1}, InvalidValue),
        ({"resamples": 2.5}, InvalidType),
        ({"level": 1.0}, InvalidValue),
        ({"level": "high"}, InvalidType),
    ],
)
def test_wrong_options(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Bootstrap(**options)
