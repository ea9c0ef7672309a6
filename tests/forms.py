"""Forms in plain calls beside the fused calls they stand for: running both, comparing both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from laws import REORDERED
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_laplace.curvature.layers import FORMS

DOUBLE = torch.float64
TOLERANCE: dict[str, Any] = {"equal_nan": True, "rtol": REORDERED, "atol": REORDERED}

Run = Callable[[], Any]

#: Recurrent networks by kind; each takes (input size, hidden size, **options).
KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
}


class Classifier(nn.Module):
    """A model of sequences (n, t, width), its outputs pooled into three classes."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh().mean(1))


class InForms(TorchFunctionMode):
    """Runs every fused call as its form, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.replaced += func in FORMS
        return FORMS.get(func, func)(*args, **(kwargs or {}))


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a nested result."""
    if isinstance(result, Tensor):
        return [result]
    parts = [] if result is None else result
    return [tensor for part in parts for tensor in tensors(part)]


def in_forms(run: Run) -> Any:
    with InForms() as mode:
        result = run()
    assert mode.replaced
    return result


def gradients(outputs: list[Tensor], wrt: list[Tensor]) -> list[Tensor]:
    """Gradients of a random combination of all outputs."""
    generator = torch.Generator().manual_seed(1)
    chosen = [output for output in outputs if output.requires_grad]
    vectors = [torch.randn(o.shape, dtype=DOUBLE, generator=generator) for o in chosen]
    return list(torch.autograd.grad(chosen, wrt, vectors, materialize_grads=True))


def assert_form_is_equivalent(run: Run, wrt: list[Tensor]) -> None:
    fused, plain = tensors(run()), tensors(in_forms(run))
    torch.testing.assert_close(plain, fused, **TOLERANCE)
    torch.testing.assert_close(gradients(plain, wrt), gradients(fused, wrt), **TOLERANCE)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, requires_grad=True)


def made(module: nn.Module) -> nn.Module:
    """The module in float64, with weights and biases away from their initial values."""
    for parameter in module.to(DOUBLE).parameters():
        nn.init.normal_(parameter, std=0.5)
    return module
