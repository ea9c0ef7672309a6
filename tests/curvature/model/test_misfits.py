"""What a mapping cannot be to a model by its signature, and whose error a misfit is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_laplace import Laplace


class Linear(nn.Module):
    """One layer on the entry p."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)


def made(kind):
    torch.manual_seed(0)
    return kind()


def entries():
    g = torch.Generator().manual_seed(1)
    p = torch.randn(6, 3, generator=g, dtype=torch.float64)
    return [{"p": p, "labels": torch.arange(6) % 2}]


class Alone(Linear):
    def forward(self, p, /):
        return self.layer(p["p"])


class Beside(Linear):
    def forward(self, p, /, **options):
        return self.layer(p["p"])


@pytest.mark.parametrize("kind", [Alone, Beside])
def test_an_argument_without_a_name_is_no_entry(kind):
    """By position alone nothing but the whole can be handed over, whatever it is called."""
    la = Laplace(made(kind), hessian_structure="full").fit(entries())
    [(x, y)] = [(batch["p"], batch["labels"]) for batch in entries()]
    plain = Laplace(made(Linear).layer, hessian_structure="full").fit([(x, y)])
    torch.testing.assert_close(la.H, plain.H, rtol=0, atol=0)


class Miscounts(Linear):
    def forward(self, p):
        return self.layer(p, p)


class Misnames(Linear):
    def forward(self, p):
        return self.layer(weight=p)


class Forgets(Linear):
    def forward(self, p):
        return self.layer()


@pytest.mark.parametrize("kind", [Miscounts, Misnames, Forgets])
def test_calls_inside_a_model_that_names_its_entries_are_its_own(kind):
    """Entries that are its arguments fit; what it calls wrongly has nothing to do with them."""
    with pytest.raises(TypeError, match=r"Linear\.forward\(\)") as caught:
        Laplace(made(kind)).fit(entries())
    assert caught.type is TypeError
