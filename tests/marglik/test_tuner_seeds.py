"""Monte-Carlo curvature in the tuner: each round draws anew, from a seed that can be told."""

from __future__ import annotations

import oracles
import pytest
import torch
from cases import Case, build

from kfac_laplace import Curvature, Laplace, MarglikTuner, MonteCarlo
from kfac_laplace.marglik.tuner import Record

#: Steps so small that δ stays what it was, to the last digit.
STILL = {"n_hypersteps": 1, "lr_hyp": 1e-40}
DELTA = 2.0

structures = pytest.mark.parametrize("structure", ["kron", "diag", "full"])
seeds = pytest.mark.parametrize("seed", [0, 7])


def rounds(case: Case, epochs: tuple[int, ...], **options) -> list[Record]:
    """Rounds at the same weights and the same hyperparameters."""
    tuner = MarglikTuner(case.model, case.likelihood, 7, prior_precision=DELTA, **STILL, **options)
    records = [tuner.step(case.batches, epoch=epoch) for epoch in epochs]
    for record in records:
        delta = record.hyperparameters["prior_precision"]
        assert torch.equal(delta, torch.full_like(delta, delta[0]))
        # Steps are taken on log δ, of which the exponential is DELTA up to rounding.
        assert float(delta[0]) == pytest.approx(DELTA, rel=1e-15)
    return records


def log_det_ratio(case: Case, seed: int, **options) -> float:
    """Σ over blocks of log det(H + δ) − log det δ, by slogdet of the blocks of one fresh pass."""
    curvature = Curvature(case.model, case.likelihood, seed=seed, **options).fit(case.batches)
    matrices = [block.dense().double() for block in curvature.blocks.values()]
    deltas = [torch.full((len(h),), DELTA, dtype=torch.float64) for h in matrices]
    terms = zip(matrices, deltas, strict=True)
    return float(sum(oracles.log_det_ratio(h, 1.0, delta) for h, delta in terms))


@structures
@seeds
def test_rounds_draw_labels_from_the_seed_and_the_epoch(structure, seed):
    """Weights and δ stand still: only the drawn labels tell one round from the next."""
    case = build("mlp-tanh")
    options = {"fisher": "mc", "hessian_structure": structure}
    epochs = (1, 2, 5)
    records = rounds(case, epochs, seed=seed, **options)
    got = [record.log_det_ratio for record in records]
    # Sums of some forty logarithms from two factorisations: ten digits agree.
    want = [log_det_ratio(case, seed + epoch, **options) for epoch in epochs]
    assert got == pytest.approx(want, rel=1e-10)
    # Other labels are other curvature: far beyond rounding.
    assert min(abs(a - b) for a, b in zip(got, got[1:], strict=False)) > 1e-3 * min(got)
    assert len({record.log_likelihood for record in records}) == 1
    assert len({record.scatter for record in records}) == 1


def test_a_round_is_the_posterior_of_its_seed():
    """The evidence of a round can be had again by `Laplace(seed=seed + epoch)`."""
    case = build("cnn")
    options = {"fisher": MonteCarlo(2), "prior_precision": DELTA}
    tuner = MarglikTuner(case.model, case.likelihood, 7, seed=3, **STILL, **options)
    for epoch in (1, 2):
        record = tuner.step(case.batches)
        la = Laplace(case.model, case.likelihood, seed=3 + epoch, **options).fit(case.batches)
        assert record.epoch == epoch
        # The same computation at a δ that differs in its last digit.
        assert record.evidence == pytest.approx(float(la.log_marginal_likelihood()), rel=1e-12)


@structures
def test_rounds_of_the_exact_fisher_repeat(structure):
    """Nothing else moves between rounds: what differs above are the labels."""
    records = rounds(build("mlp-tanh"), (1, 2, 5), hessian_structure=structure)
    assert len({record.log_det_ratio for record in records}) == 1
