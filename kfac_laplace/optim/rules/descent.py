"""What is done to all tensors of a step at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_laplace.optim.rules.rule import State, Update


@torch.no_grad()
def descend_(
    parameters: Sequence[Tensor],
    updates: Sequence[Update],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """W ← (1 − lr · weight_decay) W, then W ← W − lr · U, for parameters of one learning rate.

    In the order of operations of `torch.optim.AdamW` (foreach=False). Source: Loshchilov and
    Hutter, "Decoupled weight decay regularization", algorithm 2.

    Args:
        parameters: changed in place; complex ones as pairs of real numbers.
        updates: of the same shapes, parameter by parameter (`Update.of`).
        lr: learning rate.
        weight_decay: decay per unit of the learning rate.
    """
    if not parameters:
        return
    lr, weights = float(lr), real_views(parameters)
    if weight_decay != 0:
        scale_(weights, 1 - lr * weight_decay)
    quotients, products = [], dict[float, list[tuple[Tensor, Tensor]]]()
    for weight, update in zip(weights, updates, strict=True):
        step = -(lr / update.divisor)
        if update.denominator is None:
            products.setdefault(step, []).append((weight, update.numerator))
        else:
            quotients.append((weight, update.numerator, update.denominator, step))
    if quotients:
        torch._foreach_addcdiv_(*map(list, zip(*quotients, strict=True)))
    for step, pairs in products.items():
        torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=step)


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply all by a number."""
    # On the CPU the call for all (torch 2.13) rounds the number to the tensors' precision first: of
    # 0.97 bfloat16 makes 0.96875. The call for one does not.
    if any(one.dtype in (torch.bfloat16, torch.float16) for one in tensors):
        for one in tensors:
            one.mul_(factor)
    else:
        torch._foreach_mul_(list(tensors), factor)


def real_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, complex ones as views of pairs of real numbers."""
    return [torch.view_as_real(one) if one.is_complex() else one for one in tensors]


def tensors(states: Sequence[State], name: str) -> list[Tensor]:
    """One of the tensors of every state, for the calls that take all groups at once."""
    found = []
    for state in states:
        one = state[name]
        assert isinstance(one, Tensor), f"'{name}' is a number"
        found.append(one)
    return found


def count_(states: Sequence[State]) -> list[int]:
    """Count a step in every state; how many each has made."""
    for state in states:
        state["step"] = int(state["step"]) + 1
    return [int(state["step"]) for state in states]
