"""Products of an activation with a weight: linear layers in disguise.

Each is an `einsum` of two operands. Letters that the weight shares with input and output count
blocks b, those shared with the input alone are summed over (i), those shared with the output alone
are its rows (o), and the letters without the weight run over examples and positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from kfac_laplace.curvature.layers.registry import Layer, layer_rule, operator_rule
from kfac_laplace.curvature.rows.inputs import Rows
from kfac_laplace.curvature.rows.layout import Fold


@operator_rule(torch.einsum)
def einsum(output: Tensor, weight: Tensor, equation: str, *operands: Any) -> Layer | None:
    """Contractions of two operands in which no letter is repeated within one."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    terms, out = equation.replace(" ", "").split("->")
    letters = dict(zip(("left", "right"), terms.split(","), strict=True))
    place, other = ("left", "right") if operands[0] is weight else ("right", "left")
    data = operands[1] if operands[0] is weight else operands[0]
    letters = {"weight": letters[place], "data": letters[other], "out": out}
    tensors = {"weight": weight, "data": data, "out": output}
    spelled = _without_ellipsis(letters, tensors)
    return _contraction(spelled, tensors) if spelled is not None else None


@operator_rule(Tensor.__rmatmul__)
def rmatmul(output: Tensor, weight: Tensor, right: Tensor, left: Tensor) -> Layer | None:
    """The operands the other way round."""
    return matmul(output, weight, left, right)


@operator_rule(torch.mm, Tensor.mm)
def mm(output: Tensor, weight: Tensor, input: Tensor, mat2: Tensor) -> Layer | None:
    """The same for matrices."""
    return matmul(output, weight, input, mat2)


@operator_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(output: Tensor, weight: Tensor, input: Tensor, other: Tensor) -> Layer | None:
    """X W or W X, batched or not; the operands of `__rmatmul__` come swapped but symmetric here."""
    left, right = input, other
    data = right if left is weight else left
    if weight.ndim < 2 or data.ndim < 2:
        return None
    weight_is_left = left is weight
    lead = ascii_letters[: output.ndim - 2]
    i, w, x = "XYZ"
    weight_letters = lead[len(lead) - (weight.ndim - 2) :] + (w + i if weight_is_left else i + w)
    data_letters = lead[len(lead) - (data.ndim - 2) :] + (i + x if weight_is_left else x + i)
    out = lead + (w + x if weight_is_left else x + w)
    letters = {"weight": weight_letters, "data": data_letters, "out": out}
    return _contraction(letters, {"weight": weight, "data": data, "out": output})


@layer_rule(torch.addmm, Tensor.addmm)
def addmm(output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Layer | None:
    """b + X W, as the Conv1D layers of GPT-2 compute it."""
    if scales or input.ndim != 1 or len(input) != output.shape[1]:
        return None
    return Layer(
        weight=mat2,
        bias=input,
        matrix=(1, *mat2.mT.shape),
        data=(mat1,),
        inputs=Rows(mat1.detach()[None]),
        output_rows=lambda grad: grad[:, None],
        fold=Fold(tuple(mat2.shape), (1, 0)),
    )


def _without_ellipsis(letters: dict[str, str], tensors: dict[str, Tensor]) -> dict[str, str] | None:
    """Spell "..." out in letters that are still free; None where the weight has one."""
    if "..." in letters["weight"]:
        return None
    spare = [letter for letter in ascii_letters if letter not in "".join(letters.values())]
    count = tensors["data"].ndim - len(letters["data"].replace("...", ""))
    return {name: term.replace("...", "".join(spare[:count])) for name, term in letters.items()}


@dataclass(frozen=True)
class _Axes:
    """Letters of a contraction by the part they play."""

    block: str
    output: str
    input: str
    lead: str


def _axes(letters: dict[str, str]) -> _Axes | None:
    """Sort the letters; None where one is repeated in an operand or summed over in it alone."""
    weight, data, out = letters["weight"], letters["data"], letters["out"]
    if any(len(set(term)) != len(term) for term in letters.values()):
        return None
    if set(weight) - set(data) - set(out) or set(data) - set(weight) - set(out):
        return None
    axes = _Axes(
        block="".join(z for z in weight if z in data and z in out),
        output="".join(z for z in weight if z not in data),
        input="".join(z for z in weight if z not in out),
        lead="".join(z for z in out if z not in weight),
    )
    return axes if axes.lead and axes.input else None


def _contraction(letters: dict[str, str], tensors: dict[str, Tensor]) -> Layer | None:
    """The layer of a contraction, or None where it is no linear map of rows."""
    weight, data, output = tensors["weight"], tensors["data"], tensors["out"]
    sizes = dict(zip(letters["out"], output.shape, strict=True))
    given = dict(zip(letters["data"], data.shape, strict=True))
    if len(set(letters["weight"])) < len(letters["weight"]):
        return None
    # Axes of length 1 along which the weight is broadcast are no axes of its own.
    own = {
        z: size
        for z, size in zip(letters["weight"], weight.shape, strict=True)
        if size != 1 or sizes.get(z, given.get(z)) == 1
    }
    letters = {**letters, "weight": "".join(own)}
    axes = _axes(letters)
    if axes is None:
        return None
    sizes |= own
    if any(given[z] != sizes[z] for z in letters["data"]):  # broadcast along an axis of length 1
        return None
    b, o, i = (prod(sizes[z] for z in part) for part in (axes.block, axes.output, axes.input))
    order = tuple(letters["weight"].index(z) for z in axes.block + axes.output + axes.input)
    return Layer(
        weight=weight,
        bias=None,
        matrix=(b, o, i),
        data=(data,),
        inputs=Rows(_rows(letters["data"], axes, axes.input, i)(data.detach()[None])[0]),
        output_rows=_rows(letters["out"], axes, axes.output, o),
        fold=None if order == tuple(sorted(order)) else Fold(tuple(own.values()), order),
    )


def _rows(term: str, axes: _Axes, own: str, size: int) -> Callable[[Tensor], Tensor]:
    """Take tensors (v, *term) to rows (v, b, *lead, own); missing lead axes have length 1."""
    missing = [k for k, z in enumerate(axes.lead) if z not in term]
    lead = "".join(z for z in axes.lead if z in term)
    order = [1 + term.index(z) for z in axes.block + lead + own]

    def rows(tensor: Tensor) -> Tensor:
        moved = tensor.permute(0, *order)
        blocks, positions = len(axes.block), len(lead)
        shape = list(moved.shape[1 + blocks : 1 + blocks + positions])
        for k in missing:
            shape.insert(k, 1)
        return moved.reshape(len(tensor), prod(moved.shape[1 : 1 + blocks]), *shape, size)

    return rows
