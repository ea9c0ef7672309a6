"""Whole networks: the exact evidence is that of one dense block over all parameters."""

import pytest
from zoo.fitting import fit, zoo_law


@pytest.mark.slow
@zoo_law
def test_exact_is_the_dense_structure(name):
    """Whatever the layers, and however many rows exist at a time."""
    want = float(
        fit(name, hessian_structure="full").posterior.apart_from_unused.log_marginal_likelihood
    )
    for la in (fit(name), fit(name, memory_budget=2000)):
        assert float(la.evidence("exact").value) == pytest.approx(want, rel=1e-10)
    bounds = fit(name).evidence("bounds")
    assert float(bounds.lower) <= want + 1e-9 * abs(want)
