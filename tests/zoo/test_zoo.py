"""The curvature of every network of the zoo, handed over as its library makes it.

The yardstick is `brute_force.Oracle`: K-FAC by formula from module hooks, exact GGN blocks by
autograd.
"""

from __future__ import annotations

import pytest
import torch
from laws import NEGLIGIBLE, assert_complete, negligible, relative_error
from torch import Tensor
from zoo.fitting import fit, oracle_of, zoo_law

from kfac_laplace.errors import InvalidValue


def bias_blocks(name: str) -> dict[str, Tensor]:
    """Exact GGN blocks of the biases with Kronecker factors; part by part where q/k/v share one."""
    oracle, found = oracle_of(name), {}
    for parameter, kind in fit(name, joint_bias=False).coverage.items():
        if kind == "kron" and oracle.is_bias(parameter):
            exact = oracle.exact([parameter])
            size = len(exact) // len(oracle.seen.places[parameter])
            diagonal = zip(exact.split(size), range(0, len(exact), size), strict=True)
            parts = [rows[:, start : start + size] for rows, start in diagonal]
            found[parameter] = torch.block_diag(*parts)
    return found


@zoo_law
def test_rows_of_the_oracle_make_exact_gradients(name):
    """Inputs, output gradients, examples and the order of entries: all that K-FAC is made of."""
    oracle = oracle_of(name)
    counted = oracle.seen.terms.hessian.flatten(1).any(1)
    scale = max(oracle.jacobian([p]).norm().item() for p in oracle.trainable)
    for parameter in oracle.trainable:
        if oracle.case.treated(parameter) == "kron" and not oracle.is_bias(parameter):
            got, want = oracle.gradients(parameter), oracle.jacobian([parameter])
            error = relative_error(got[counted], want[counted], NEGLIGIBLE * scale)
            assert error < oracle.case.tolerance, parameter


@zoo_law
def test_every_parameter_is_treated_as_listed(name):
    case, curvature = oracle_of(name).case, fit(name).curvature
    assert_complete(curvature, case.model)
    expected = {parameter: case.treated(parameter) for parameter in curvature.coverage}
    assert curvature.coverage == expected


@zoo_law
@pytest.mark.parametrize("joint_bias", [True, False])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_kronecker_blocks_follow_the_formula(name, setting, joint_bias):
    oracle = oracle_of(name)
    curvature = fit(name, kfac_approx=setting, joint_bias=joint_bias).curvature
    for block in curvature.blocks.values():
        if block.kind == "kron":
            want = oracle.kfac(block.params, setting)
            error = relative_error(block.dense(), want, negligible(curvature))
            assert error < oracle.case.tolerance, f"{block.params}: {error:.1e}"


@zoo_law
def test_biases_are_exact_under_reduce(name):
    """Their gradient is the sum over rows, whatever the network: no approximation is left."""
    case, exact = oracle_of(name).case, bias_blocks(name)
    named = [p for p in oracle_of(name).trainable if "bias" in p.rpartition(".")[2]]
    if not any(case.treated(p) == "kron" for p in named):
        pytest.skip("a network whose linear layers have no biases")
    assert exact
    curvature = fit(name, kfac_approx="reduce", joint_bias=False).curvature
    for parameter, want in exact.items():
        block = curvature.blocks[parameter]
        assert block.params == (parameter,)
        error = relative_error(block.dense(), want, negligible(curvature))
        assert error < case.tolerance, f"{parameter}: {error:.1e}"


@zoo_law
def test_other_blocks_are_exact(name):
    """Norms whole, the rest on the diagonal."""
    oracle, curvature = oracle_of(name), fit(name).curvature
    others = [block for block in curvature.blocks.values() if block.kind != "kron"]
    if not others:
        pytest.skip("a network of linear layers alone")
    for block in others:
        if block.kind == "dense":
            exact = oracle.exact(block.params)
        else:
            exact = oracle.exact_diagonal(block.params).diag()
        error = relative_error(block.dense(), exact, negligible(curvature))
        assert error < oracle.case.tolerance, f"{block.params}: {error:.1e}"


@zoo_law
def test_the_diagonal_structure_is_exact(name):
    oracle = oracle_of(name)
    curvature = fit(name, hessian_structure="diag").curvature
    assert_complete(curvature, oracle.case.model)
    for block in curvature.blocks.values():
        exact = oracle.exact_diagonal(block.params)
        floor = negligible(curvature)
        error = relative_error(block.dense().diagonal(), exact, floor)
        assert error < oracle.case.tolerance, f"{block.params}: {error:.1e}"


@zoo_law
def test_the_last_layer_is_found_by_use(name):
    """Its block is the one that it has among all layers; a head tied to an embedding is refused."""
    oracle, every = oracle_of(name), fit(name)
    used = [oracle.seen.twin.get_parameter(oracle.seen.places[p][0]) for p in oracle.trainable]
    last = [
        name
        for name, parameter in zip(oracle.trainable, used, strict=True)
        if any(parameter is own for own in oracle.seen.last.parameters(recurse=False))
    ]
    if oracle.case.treated(last[0]) != "kron":
        with pytest.raises(InvalidValue, match="used in other ways"):
            fit(name, subset_of_weights="last_layer")
        return
    la = fit(name, subset_of_weights="last_layer")
    assert [p for p, kind in la.coverage.items() if kind != "frozen"] == last
    for key, block in la.curvature.blocks.items():
        torch.testing.assert_close(block.dense(), every.curvature.blocks[key].dense())
