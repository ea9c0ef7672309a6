"""Outputs that went through a softmax or sigmoid although they are taken for logits."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

#: Graph nodes that leave values what they are, by name without "Backward0".
TRANSPARENT = {
    "Alias",
    "AsStrided",
    "Cat",
    "Clamp",
    "Clone",
    "Expand",
    "Index",
    "Permute",
    "Reshape",
    "Select",
    "Slice",
    "Split",
    "Squeeze",
    "Stack",
    "T",
    "ToCopy",
    "Transpose",
    "Unbind",
    "UnsafeView",
    "Unsqueeze",
    "View",
}
ACTIVATIONS = {"Softmax": "softmax", "Sigmoid": "sigmoid", "LogSigmoid": "log-sigmoid"}
#: Chance at which numbers of no meaning may look like probabilities.
CHANCE = 1e-5
#: Sums of so many times the machine precision from one still are those of probabilities.
SUMMED = 16
#: Numbers needed for values to tell a sigmoid, and the share of them that lies near either end.
MANY, SHARE, NEAR = 64, 0.1, 0.1


def softmax_rows(f: Tensor) -> bool:
    """Whether rows (..., c) are probabilities that add up to one, and not by chance.

    Numbers of order one that have nothing to do with each other would add up to one within the
    tolerance with a probability of twice that, so that a few rows decide.
    """
    eps = torch.finfo(f.dtype).eps * SUMMED
    rows = f[..., 0].numel()
    if f.shape[-1] < 2 or not in_unit_interval(f) or rows * math.log(2 * eps) > math.log(CHANCE):
        return False
    return bool(((f.double().sum(-1) - 1).abs() <= eps).all())


def sigmoid_values(f: Tensor) -> bool:
    """Whether many values fill [0, 1] up to both ends and none is outside.

    Logits do not: of a distribution with a tenth of its mass within 0.1 of either end, some of 64
    values would lie beyond it.
    """
    if f.numel() < MANY or not in_unit_interval(f):
        return False
    low, high = (f < NEAR).double().mean(), (f > 1 - NEAR).double().mean()
    return bool(low >= SHARE) and bool(high >= SHARE)


def in_unit_interval(f: Tensor) -> bool:
    """Whether all values lie in [0, 1]."""
    return bool(((f >= 0) & (f <= 1)).all())


def last_activation(f: Tensor) -> str:
    """The activation that outputs come from, by their graph, whatever reshaped them after; or "".

    Of several parts all must have one.
    """
    found = set(_activations([f.grad_fn], limit=1000))
    return found.pop() if len(found) == 1 else ""


def _activations(nodes: Iterable[torch.autograd.graph.Node | None], limit: int) -> Iterable[str]:
    """What is above each way down the graph through nodes that only reshape."""
    stack, seen = list(nodes), 0
    while stack and seen < limit:
        node, seen = stack.pop(), seen + 1
        name = "" if node is None else node.name().split("Backward")[0].lstrip("_")
        if node is not None and name in TRANSPARENT:
            stack.extend(below for below, _ in node.next_functions if below is not None)
        else:
            yield ACTIVATIONS.get(name, "")
