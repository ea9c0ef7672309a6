"""Mappings for models whose signature tells little."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace
from kfac_laplace.errors import InvalidType, UnsupportedUse


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2).double()

    def forward(self, data):
        return self.a(data["p"])


class WholeAndKeywords(Whole):
    def forward(self, data, **options):
        assert not options
        return self.a(data["p"])


class Starred(Whole):
    def forward(self, *args):
        return self.a(args[0]["p"])


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = Whole()

    def forward(self, *args, **options):
        return self.m(*args, **options)


def loader():
    torch.manual_seed(0)
    return [{"p": torch.randn(4, 3).double(), "labels": torch.arange(4) % 2}]


def evidence(kind, **options):
    torch.manual_seed(1)
    return float(Laplace(kind(), **options).fit(loader()).log_marginal_likelihood())


def test_one_argument_beside_keywords_gets_the_whole():
    assert evidence(WholeAndKeywords) == evidence(Whole)


@pytest.mark.parametrize("kind", [Starred, Wrapper])
def test_where_the_signature_cannot_tell_the_remedy_helps(kind):
    with pytest.raises(InvalidType, match=r"forward_fn=lambda model, x: model\(x\)"):
        evidence(kind)
    assert evidence(kind, forward_fn=lambda model, x: model(x)) == evidence(Whole)


class Complex(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.where = where
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        size = 3 if where == "first" else 4
        self.c = nn.Linear(size, size if where == "first" else 2, dtype=torch.complex64)

    def forward(self, x):
        if self.where == "first":
            return self.last(self.first(self.c(x.cfloat()).abs()))
        return self.c(self.first(x).cfloat()).abs()


def test_a_complex_last_layer_is_refused_and_an_earlier_one_is_not():
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    with pytest.raises(UnsupportedUse, match=r"^c\.weight.*complex.*view_as_complex"):
        Laplace(Complex("last"), subset_of_weights="last_layer").fit([(x, y)])
    la = Laplace(Complex("first"), subset_of_weights="last_layer").fit([(x, y)])
    assert la.curvature.params == ("last.weight", "last.bias")
