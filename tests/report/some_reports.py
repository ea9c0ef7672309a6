"""Reports of small models: classes, values, a model whose names are markup."""

from __future__ import annotations

from functools import cache

import torch
from cases import build
from posterior import dense

from kfac_laplace import Laplace
from kfac_laplace.report import Report

#: Names of `made` that differ in their panels.
REPORTS = ("classes", "values", "alone")


class Tagged(torch.nn.Module):
    """A layer whose name means something to browsers and to matplotlib."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.add_module("<b>&$x$", torch.nn.Linear(4, 3).double())

    def forward(self, x):
        return self.get_submodule("<b>&$x$")(x)


@cache
def made(name: str) -> Report:
    """A report, made once; "alone" is that of a single example without strange inputs."""
    if name == "tag":
        case = build("mlp-tanh")
        la = Laplace(Tagged()).fit(case.batches)
        return la.report(case.batches, ood_loader=[5 * case.x], resamples=200)
    la, case = dense.fit("mlp-regression" if name == "values" else "mlp-tanh")
    if name == "alone":
        return la.report([(case.x[:1], case.y[:1])])
    if name == "classes":
        la.calibrate([(case.x + 0.1, case.y)], "validation")
    return la.report(case.batches, ood_loader=[5 * case.x], resamples=200)
