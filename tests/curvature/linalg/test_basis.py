"""Bases of which few columns are given turn as the matrices that they stand for."""

from __future__ import annotations

import pytest
import torch

from kfac_laplace.curvature.linalg.basis import (
    Completed,
    columns_turned,
    columns_turned_back,
    multiplications,
    turned,
    turned_back,
)

D = 7
UNITS = torch.eye(D, dtype=torch.float64)


def some(k: int) -> torch.Tensor:
    """Orthonormal columns (2, D, k)."""
    draws = torch.randn(2, D, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    return torch.linalg.qr(draws)[0]


COLUMNS = {
    "none": some(0),
    "one": some(1),
    "few": some(3),
    "all": some(D),
    "the first units": UNITS[None, :, :3],
    "their negatives": -UNITS[None, :, :3],
    "other units": UNITS[None, :, 3:6],
    "units in another order": UNITS[None, :, [2, 0, 1]],
    "nearly units": torch.linalg.qr(UNITS[None, :, :3] + 1e-9 * some(3)[:1])[0],
}


def matrix(basis: Completed) -> torch.Tensor:
    """Q (b, D, D)."""
    return turned(UNITS.expand(len(basis.turn), D, D), basis)


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_the_first_columns_are_those_given_and_all_are_orthonormal(columns):
    basis = matrix(Completed.of(columns))
    torch.testing.assert_close(basis[..., : columns.shape[-1]], columns, rtol=0, atol=1e-14)
    torch.testing.assert_close(basis.mT @ basis, UNITS.expand_as(basis), rtol=0, atol=1e-14)


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_products_are_those_with_the_matrix(columns):
    basis = Completed.of(columns)
    dense = matrix(basis)
    b = len(dense)
    rows = torch.randn(4, b, 5, D, dtype=torch.float64)
    for got, want in (
        (turned(rows, basis), rows @ dense),
        (turned_back(rows, basis), rows @ dense.mT),
        (columns_turned(rows.mT, basis), dense.mT @ rows.mT),
        (columns_turned_back(rows.mT, basis), dense @ rows.mT),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_a_matrix_is_its_own_basis():
    dense, rows = some(D), torch.randn(2, 5, D, dtype=torch.float64)
    assert torch.equal(turned(rows, dense), rows @ dense)
    assert torch.equal(turned_back(rows, dense), rows @ dense.mT)
    assert torch.equal(columns_turned(rows.mT, dense), dense.mT @ rows.mT)
    assert torch.equal(columns_turned_back(rows.mT, dense), dense @ rows.mT)


def test_it_is_cast_and_counted():
    basis = Completed.of(some(2))
    single = basis.to(torch.float32)
    assert matrix(basis).dtype == torch.float64
    rows = torch.randn(2, 5, D)
    torch.testing.assert_close(turned(rows, single), rows @ matrix(basis).float())
    assert multiplications(basis) == 2 * 2 * (D + 2) < multiplications(matrix(basis)) == D * D
