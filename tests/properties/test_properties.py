"""Laws of curvature and posteriors, on networks and data that hypothesis draws.

The yardstick is plain autograd: Jacobians, second derivatives of torch's own losses, dense algebra.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import relative_error
from properties.networks import Case, cases

from kfac_laplace import Curvature, Laplace

ROUNDING = 1e-9
#: The quick ones are the same every time; the long ones are others each time that they are asked.
QUICK = settings(max_examples=12, derandomize=True, deadline=None, database=None)
LONG = settings(max_examples=400, deadline=None, print_blob=True)
LENGTHS = [pytest.param(QUICK, id="quick"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
laws = pytest.mark.parametrize("length", LENGTHS)


def hold(
    law: Callable[..., None], length: settings, *strategies: st.SearchStrategy[object]
) -> None:
    """A law, on as many draws as the length says."""
    length(given(*strategies)(law))()


def fitted(case: Case, **options: object) -> Curvature:
    """The curvature of all batches."""
    return Curvature(case.model, case.likelihood, **options).fit(case.batches)  # type: ignore[arg-type]


@laws
def test_full_is_the_ggn_and_diag_its_diagonal(length):
    def law(case: Case) -> None:
        want = case.ggn()
        full = fitted(case, hessian_structure="full").blocks["full"]
        assert relative_error(full.dense(), want, 1e-6) < ROUNDING
        diagonal = fitted(case, hessian_structure="diag").blocks
        places = {name: p.numel() for name, p in case.trained.items()}
        exact = dict(zip(places, want.diagonal().split([*places.values()]), strict=True))
        for block in diagonal.values():
            own = torch.cat([exact[name] for name in block.params])
            assert relative_error(block.dense().diagonal(), own, 1e-6) < ROUNDING

    hold(law, length, cases())


@laws
def test_batches_and_their_order_do_not_matter(length):
    def law(case: Case, structure: str, setting: str, turned: bool) -> None:
        options = {"hessian_structure": structure, "kfac_approx": setting}
        got = fitted(case, **options)
        whole = [(case.x, case.y)] if not turned else [(case.x.flip(0), case.y.flip(0))]
        want = Curvature(case.model, case.likelihood, **options).fit(whole)
        assert got.n_data == want.n_data == len(case.x)
        for name, block in want.blocks.items():
            assert relative_error(got.blocks[name].dense(), block.dense(), 1e-6) < ROUNDING
        torch.testing.assert_close(got.statistic, want.statistic, rtol=1e-12, atol=1e-12)

    structures = st.sampled_from(["kron", "diag", "full", "lowrank"])
    hold(law, length, cases(), structures, st.sampled_from(["expand", "reduce"]), st.booleans())


@laws
def test_a_linear_gaussian_layer_has_no_approximation(length):
    """Where Λ is the identity and rows are examples, B ⊗ A is the GGN [KFAC23]."""

    def law(case: Case, setting: str) -> None:
        for parameter in case.model[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(False)
        (block,) = fitted(case, kfac_approx=setting).blocks.values()
        assert relative_error(block.dense(), case.ggn(), 1e-6) < ROUNDING

    whole = cases(kinds=("mlp",), likelihoods=("regression",)).filter(
        lambda case: all(p.requires_grad for p in case.model[2].parameters())  # type: ignore[index]
    )
    hold(law, length, whole, st.sampled_from(["expand", "reduce"]))


@laws
def test_posteriors_are_dense_algebra(length):
    def law(case: Case, delta: float) -> None:
        la = Laplace(case.model, case.likelihood, hessian_structure="full", prior_precision=delta)
        la.fit(case.batches)
        size = sum(p.numel() for p in case.trained.values())
        precision = case.ggn() + delta * torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(
            la.log_det_posterior_precision, torch.linalg.slogdet(precision).logabsdet,
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        rows = case.jacobian()
        want = rows @ torch.linalg.solve(precision, rows.mT.double()) if rows.numel() else rows
        got = la.predict(case.x, link_approx="probit").covariance
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-7, atol=1e-9)

    hold(law, length, cases(), st.floats(0.05, 20.0))


@laws
def test_data_that_count_twice_are_merged(length):
    def law(case: Case, structure: str) -> None:
        once, twice = (fitted(case, hessian_structure=structure) for _ in range(2))
        twice.merge(once)
        for name, block in once.blocks.items():
            assert relative_error(twice.blocks[name].dense(), 2 * block.dense(), 1e-6) < ROUNDING
        assert twice.n_data == 2 * once.n_data

    hold(law, length, cases(), st.sampled_from(["kron", "diag", "full"]))
