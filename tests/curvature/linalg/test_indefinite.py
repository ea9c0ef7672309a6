"""Curvature that is not positive semi-definite is refused; rounding below zero is zero."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from cases import Case, build
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.curvature.linalg.spectrum import eigenvalues
from kfac_laplace.errors import InvalidValue
from kfac_laplace.states.plain import sealed

D = 6
REFUSAL = "not positive semi-definite"
#: d ε λ_max of float32: what the eigenvalues of a Gram matrix of such rows may be off by.
ROUNDING = D * torch.finfo(torch.float32).eps


def with_spectrum(*values: float) -> Tensor:
    """A symmetric matrix (1, D, D) of known eigenvalues, by two reflections."""
    matrix = torch.tensor(values, dtype=torch.float64).diag()
    for k in (1, 2):
        normal = torch.arange(k, k + D, dtype=torch.float64).sin()
        reflection = torch.eye(D) - 2 * torch.outer(normal, normal) / normal.dot(normal)
        matrix = reflection @ matrix @ reflection
    return ((matrix + matrix.T) / 2)[None]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("smallest", [-3.0, -1.0, -1e-3, -100 * ROUNDING])
def test_negative_eigenvalues_are_refused(smallest, scale):
    """Whatever the scale; also where the largest in size is the negative one."""
    matrix = scale * with_spectrum(smallest, 0.0, 0.1, 0.5, 0.7, 1.0)
    with pytest.raises(InvalidValue, match=f"^here: curvature is {REFUSAL}") as caught:
        eigenvalues(matrix, "here")
    assert f"smallest eigenvalue {scale * smallest:.3e}" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("smallest", [-ROUNDING, -1e-9, -1e-16, 0.0])
def test_negative_rounding_errors_become_zero(smallest, scale):
    """The others stay as they are."""
    spectrum = (smallest, smallest / 2, 0.1, 0.5, 0.7, 1.0)
    (got,) = eigenvalues(scale * with_spectrum(*spectrum), "here")
    # The products of the reflections and the solver are of float64: a few hundred ε.
    want = scale * torch.tensor(spectrum, dtype=torch.float64).clamp_min(0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13 * scale)
    assert (got >= 0).all()
    if smallest <= -1e-9:
        assert torch.equal(got[:2], torch.zeros(2, dtype=torch.float64))


def test_each_matrix_of_a_stack_answers_for_itself():
    """A negative eigenvalue is not small because another matrix is large."""
    good = with_spectrum(0.0, 0.1, 0.2, 0.5, 0.7, 1.0)
    bad = 1e-6 * with_spectrum(-0.5, 0.1, 0.2, 0.5, 0.7, 1.0)
    assert float(bad.abs().max()) < ROUNDING  # so small that beside `good` it would pass
    eigenvalues(torch.cat([good, good]), "here")
    for stack in ([good, bad], [bad, good]):
        with pytest.raises(InvalidValue, match=REFUSAL):
            eigenvalues(torch.cat(stack), "here")


def with_zeros(x: float) -> Tensor:
    """A matrix (1, D, D) with x beside two zeros on the diagonal, one row of zeros, ones else."""
    matrix = torch.eye(D, dtype=torch.float64)
    matrix[0, 0] = matrix[2, 2] = matrix[4, 4] = 0
    matrix[0, 2] = matrix[2, 0] = x
    return matrix[None]


@pytest.mark.parametrize("x", [1.0, -2.5, 100 * ROUNDING])
def test_a_zero_on_the_diagonal_stands_in_a_row_of_zeros(x):
    """det [[0, x], [x, 0]] = −x²: such rows are not those of units that are always off."""
    for matrix in (with_zeros(x), torch.tensor([[[0.0, x], [x, 3.0]]]).double()):
        with pytest.raises(InvalidValue, match=f"^here: curvature is {REFUSAL}") as caught:
            eigenvalues(matrix, "here")
        assert f"{abs(x):.3e} beside a zero on the diagonal" in str(caught.value)


@pytest.mark.parametrize("x", [0.0, 1e-30, ROUNDING])
def test_what_is_beside_a_zero_may_be_rounding(x):
    """Gradients of 1e-25 have a square of zero in float32, and products with others."""
    (values,) = eigenvalues(with_zeros(x), "here")
    assert torch.equal(values, torch.tensor([0, 0, 0, 1, 1, 1]).double())


def test_entries_that_are_small_everywhere_are_no_rounding():
    matrix = 1e-20 * torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    with pytest.raises(InvalidValue, match=f"{REFUSAL}. got 1.000e-20 beside a zero"):
        eigenvalues(matrix, "here")


def test_a_row_is_off_only_where_it_is_off_in_all_matrices():
    """What is zero on the diagonal of one matrix alone goes to the solver, and is seen there."""
    good, bad = with_spectrum(0.0, 0.1, 0.2, 0.5, 0.7, 1.0), with_zeros(1.0)
    with pytest.raises(InvalidValue, match=f"{REFUSAL}. got smallest eigenvalue -1.000e"):
        eigenvalues(torch.cat([good, bad]), "here")


def replaced(la: Laplace, name: str, **tensors: Tensor) -> None:
    """Put other raw sums into a block."""
    plant(la.curvature, name, tensors)


def plant(curvature: Curvature, name: str, tensors: dict[str, Tensor]) -> None:
    """A GGN with other raw sums in a block, in place of the curvature's own."""
    ggn = curvature.ggn
    block = dataclasses.replace(ggn.blocks[name], **tensors)
    curvature.ggn = dataclasses.replace(ggn, blocks={**ggn.blocks, name: block})


def assert_asked_in_vain(la: Laplace, name: str, got: str) -> None:
    message = re.escape(f"{name}: curvature is {REFUSAL}. got {got}")
    for ask in (la.log_marginal_likelihood, lambda: la.sample(1)):
        with pytest.raises(InvalidValue, match=f"^{message}"):
            ask()


def test_a_negative_entry_of_a_diagonal_block():
    """However small: a sum of squares has no rounding below zero."""
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, hessian_structure="diag").fit(case.batches)
    values = la.curvature.blocks["0.weight"].values.clone()
    values[0, 0, 0] = -1e-20
    replaced(la, "0.weight", values=values)
    assert_asked_in_vain(la, "0.weight", "smallest eigenvalue -1.000e-20")


def test_a_negative_count_of_a_lookup():
    """The diagonal input factor of a table."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    batch = (torch.tensor([[0, 1], [2, 2], [4, 0]]), torch.tensor([0, 1, 1]))
    la = Laplace(model, "classification", kfac_approx="expand").fit([batch])
    counts = la.curvature.blocks["0.weight"].input_sum.clone()
    assert counts.tolist() == [[2, 1, 2, 0, 1]]
    counts[0, 3] = -0.5
    replaced(la, "0.weight", input_sum=counts)
    assert_asked_in_vain(la, "0.weight", "smallest eigenvalue -5.000e-01")


def test_a_negative_direction_of_a_dense_block():
    """The exact block of a norm."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)).double()
    batch = (torch.randn(9, 4).double(), torch.arange(9) % 2)
    la = Laplace(model, "classification").fit([batch])
    block = la.curvature.blocks["1.weight"]
    assert block.kind == "dense"
    eye = torch.eye(len(block.matrix), dtype=torch.float64)
    moved = block.matrix - 0.1 * block.matrix.trace() * eye
    replaced(la, "1.weight", matrix=moved)
    smallest = float(torch.linalg.eigvalsh(moved).min())
    assert smallest < 0
    assert_asked_in_vain(la, "1.weight", f"smallest eigenvalue {smallest:.3e}")


sides = pytest.mark.parametrize("side", ["input", "output"])


def fitted() -> tuple[Laplace, Case]:
    case = build("mlp-tanh")
    return Laplace(case.model, case.likelihood).fit(case.batches), case


def raw_sum(la: Laplace, side: str) -> Tensor:
    """The sum (1, d, d) behind a factor of the first layer."""
    block = la.curvature.blocks["0.weight"]
    factor = getattr(block.factors, side)
    return factor * la.n_data if side == "input" else factor  # A is a mean over the examples


def sums_of(side: str, matrix: Tensor) -> dict[str, Tensor]:
    """How a block keeps such a sum, with no row beside it."""
    gram = Gram.of(matrix)
    return {f"{side}_sum": gram.packed, f"{side}_rows": gram.rows}


def assert_refused(la: Laplace, case: Case, matrix: Tensor) -> None:
    """Whatever needs the spectrum names the layer and the smallest eigenvalue of `matrix`."""
    smallest = float(torch.linalg.eigvalsh(matrix).min())
    assert smallest < 0
    message = re.escape(f"curvature is {REFUSAL}. got smallest eigenvalue {smallest:.3e}")
    for ask in (la.log_marginal_likelihood, lambda: la.predict(case.x), lambda: la.sample(1)):
        with pytest.raises(InvalidValue, match=f"^0.weight: {message}"):
            ask()


@sides
@pytest.mark.parametrize("share", [1e-3, 0.1])
def test_a_loaded_state_with_an_indefinite_factor(side, share, tmp_path):
    """A file whose sum was shifted below zero: no evidence comes of it."""
    la, case = fitted()
    matrix = raw_sum(la, side)
    values = torch.linalg.eigvalsh(matrix)[0]
    shift = float(values[0] + share * values[-1])
    moved = matrix - shift * torch.eye(matrix.shape[-1], dtype=torch.float64)
    state = la.state_dict()
    state["curvature"]["ggn"]["blocks"]["0.weight"] |= sums_of(side, moved)
    state["curvature"] = sealed(state["curvature"])
    torch.save(sealed(state), tmp_path / "posterior.pt")
    assert_refused(Laplace.load(tmp_path / "posterior.pt", case.model), case, moved)


@sides
def test_a_merged_curvature_that_takes_away_more_than_there_was(side):
    """Data subtracted twice: H − 2H."""
    la, case = fitted()
    other, _ = fitted()
    left = -raw_sum(la, side)
    plant(other.curvature, "0.weight", sums_of(side, 2 * left))
    la.curvature.merge(other.curvature)
    assert_refused(la, case, left)
