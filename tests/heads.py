"""Networks whose output layer may be cut: more classes than the width of what it reads."""

from __future__ import annotations

import torch
from cases import MicroViT, Pool, case
from torch import Tensor, nn

from kfac_laplace import Bernoulli, Categorical, Exact, Gaussian

CLASSES, WIDTH = 12, 4


class Uncut(Exact):
    """The same roots, backpropagated from the outputs: only `Exact` itself is cut."""


def mlp(**head) -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5),
        nn.Tanh(),
        nn.Linear(5, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, CLASSES, **head),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, WIDTH, 2, stride=2, bias=False),
        nn.Tanh(),
        Pool(2, 3),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )


class Transposed(nn.Module):
    """A head that is `addmm`, as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, CLASSES))
        self.bias = nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.body(x).tanh(), self.weight)


class Written(nn.Module):
    """The head's input is written into afterwards."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).sin()
        output = self.head(h * 1)
        h.mul_(2)
        return output


def frozen(*names: str) -> nn.Module:
    model = mlp()
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


MODELS = {
    "mlp": (mlp, (3,)),
    "no bias": (lambda: mlp(bias=False), (3,)),
    "cnn": (cnn, (1, 4, 4)),
    "vit": (lambda: MicroViT(WIDTH, CLASSES), (1, 4, 4)),
    "addmm": (Transposed, (3,)),
    "written": (Written, (3,)),
    "frozen head bias": (lambda: frozen("4.bias"), (3,)),
    "frozen head weight": (lambda: frozen("4.weight"), (3,)),
    "frozen head": (lambda: frozen("4.weight", "4.bias"), (3,)),
    "head alone": (lambda: frozen("0.weight", "0.bias", "2.weight", "2.bias"), (3,)),
}

LIKELIHOODS = {
    "classification": Categorical(),
    "weighted": Categorical(weight=torch.linspace(0, 2, CLASSES), ignore_index=1),
    "smooth": Categorical(weight=torch.linspace(0.5, 2, CLASSES), label_smoothing=0.2),
    "regression": Gaussian(),
    "binary": Bernoulli(pos_weight=torch.linspace(0.2, 3, CLASSES)),
}


def example(name: str, likelihood: str = "classification"):
    """A seeded case; its last batch has one example."""
    kinds = {Gaussian: "regression", Bernoulli: "binary"}
    kind = kinds.get(type(LIKELIHOODS[likelihood]), "classification")
    make, shape = MODELS[name]
    torch.manual_seed(5)
    return case(make(), shape, kind)
