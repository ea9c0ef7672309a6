"""Layers that meet the same rows share the work for A, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.estimate.shared_grams import SharedGrams
from kfac_laplace.curvature.linalg.gram import Gram
from kfac_laplace.curvature.rows.inputs import Rows, WithOne

N, T, D = 6, 3, 4


class Heads(nn.Module):
    """Three layers on the same tokens, one on a slice of them, one on others of the same place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.plain, self.part = (
            nn.Linear(D, 2), nn.Linear(D, 5), nn.Linear(D, 3, bias=False), nn.Linear(D, 2),
        )  # fmt: skip
        self.double()

    def forward(self, x):
        halves = self.part(x[:, :2]).sum(1)
        return (
            halves
            + self.query(x).tanh().sum(1)
            + self.key(x).sum(1)[:, :2] * self.plain(x).sum(1)[:, 1:]
        )


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_factors_are_those_of_each_layer_alone(setting):
    x = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(N, 2).double()
    options = {"fisher": "exact", "kfac_approx": setting}
    model = Heads()
    together = Curvature(model, "regression", **options).accumulate(x, y).blocks
    assert together.keys() == {"query.weight", "key.weight", "plain.weight", "part.weight"}
    for name, block in together.items():
        alone = Curvature(model, "regression", subset_of_weights=[f"{name[:-7]}.*"], **options)
        (own,) = alone.accumulate(x, y).blocks.values()
        for found, expected in zip(block.factors, own.factors, strict=True):
            assert torch.equal(found, expected)
    rows = x if setting == "expand" else x.mean(1)
    rows = torch.cat([rows.reshape(-1, D), torch.ones(rows.numel() // D, 1).double()], 1)
    for name in ("query.weight", "key.weight"):
        torch.testing.assert_close(together[name].factors.input[0], rows.T @ rows / len(rows))


def test_what_is_added_to_one_does_not_reach_the_others():
    """It is made once; whoever takes it may write into it, and the last one leaves nothing."""
    grams, made = SharedGrams(), []

    def make():
        made.append(Gram.of(torch.eye(D).double()[None]))
        return made[-1]

    for _ in range(3):
        grams.want("rows")
    for _ in range(3):
        gram = grams.take("rows", make)
        assert torch.equal(gram.matrices()[0], torch.eye(D).double())
        gram.packed.zero_()
    assert len(made) == 1
    grams.want("rows")
    assert grams.take("rows", make) is made[1]


def test_other_rows_have_other_keys():
    x = torch.randn(5, D, D)
    same = Rows(x[None]).key
    assert Rows(x.detach()[None]).key == same
    others = [x.clone()[None], x[None].mT, x[None, :4], x[None, 1:], x[None].double()]
    assert all(Rows(one).key != same for one in others)
    assert WithOne(Rows(x[None])).key not in (None, same)
