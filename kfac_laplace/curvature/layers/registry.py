"""Layer rules: what a functional call does with its weight, and where to register one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from kfac_laplace.curvature.rows.inputs import Inputs
from kfac_laplace.curvature.rows.layout import Fold


@dataclass(frozen=True)
class Layer:
    """One use of a weight and a bias: output row = W · input row + bias, for each of b blocks.

    Args:
        weight: the weight tensor that the call received.
        bias: its bias, or None.
        matrix: (b, o, i), the weight seen as b matrices.
        data: the tensors through which the graph goes on below this layer.
        inputs: rows that meet the weight.
        output_rows: takes gradients of the call's output (v, *shape) to rows (v, b, *lead, o).
        kronecker: whether B ⊗ A is the treatment; False asks for an exact block.
        covered: whether an exact block is dense where it is small; otherwise it is diagonal, and
            `uncovered` applies to it.
        fold: how the weight becomes its matrices, where a plain reshape does not do it.
    """

    weight: Tensor
    bias: Tensor | None
    matrix: tuple[int, int, int]
    data: tuple[Tensor, ...]
    inputs: Inputs
    output_rows: Callable[[Tensor], Tensor]
    kronecker: bool = True
    covered: bool = True
    fold: Fold | None = None


Registered = TypeVar("Registered", bound=Callable[..., Any])

Rule = Callable[..., Layer | None]
RULES: dict[Callable[..., Any], Rule] = {}

OPERATORS: dict[Callable[..., Any], Rule] = {}

REPETITIONS: dict[Callable[..., Any], Rule] = {}

Guard = Callable[..., None]
GUARDS: dict[Callable[..., Any], Guard] = {}

Form = Callable[..., Any]
FORMS: dict[Callable[..., Any], Form] = {}


def _registering(
    table: dict[Callable[..., Any], Registered], functions: tuple[Callable[..., Any], ...]
) -> Callable[[Registered], Registered]:
    """A decorator that enters what it decorates for some functions."""

    def register(entry: Registered) -> Registered:
        table.update(dict.fromkeys(functions, entry))
        return entry

    return register


def layer_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functional calls.

    The rule is called as `rule(output, *args, **kwargs)` with the call's output and its own
    arguments, and describes the call as a `Layer`, or returns None for a call that it does not
    cover.

    Args:
        functions: the functions, as `torch.overrides` sees them (`F.linear`, `F.conv2d`, …).

    Example:
        With a rule the weight of `torch.inner` has Kronecker factors, without one a diagonal:

        >>> import torch
        >>> from kfac_laplace import Curvature, layer_rule
        >>> from kfac_laplace.curvature.layers import Layer, Rows
        >>> @layer_rule(torch.inner)
        ... def inner(output, input, weight):  # (n, o) from (n, i) and (o, i)
        ...     return Layer(
        ...         weight=weight,
        ...         bias=None,
        ...         matrix=(1, *weight.shape),  # (b, o, i)
        ...         data=(input,),
        ...         inputs=Rows(input.detach()[None]),  # (b, n, i)
        ...         output_rows=lambda grad: grad[:, None],  # (v, n, o) to (v, b, n, o)
        ...     )
        >>> class Inner(torch.nn.Linear):
        ...     def forward(self, input):
        ...         return torch.inner(input, self.weight)
        >>> model, x, y = Inner(3, 2, bias=False), torch.ones(2, 3), torch.tensor([0, 1])
        >>> Curvature(model, "classification").accumulate(x, y).coverage
        {'weight': 'kron'}
    """
    return _registering(RULES, functions)


def operator_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for calls that take a weight in any of several places, as operators do.

    The rule is called as `rule(output, weight, *args, **kwargs)`, where `weight` is the one
    argument that is made of tracked parameters, and is a `layer_rule` in all else.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(OPERATORS, functions)


def repetition_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for calls on parameters alone that repeat them over the examples.

    Each example uses what was repeated for it. The rule is called as
    `rule(output, n, weight, *args, **kwargs)` with the number of examples n, the one argument that
    is made of tracked parameters, and the call's own arguments; it returns None for calls that
    repeat over something else.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(REPETITIONS, functions)


def equivalent_form(*functions: Callable[..., Any]) -> Callable[[Form], Form]:
    """Register a form of a fused call in plain calls, which have rules.

    While uses are recorded, the form runs in place of the call: it takes the same arguments and
    returns the same values.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(FORMS, functions)


def guard(*functions: Callable[..., Any]) -> Callable[[Guard], Guard]:
    """Register a check that runs before every such call, whoever makes it, and may refuse it.

    It is called as `check(with_data, *args, **kwargs)`, where `with_data` says whether an argument
    may differ between examples.

    Args:
        functions: the functions, as `torch.overrides` sees them.
    """
    return _registering(GUARDS, functions)
