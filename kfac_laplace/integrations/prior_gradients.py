"""The prior's part of the gradients of a loop whose loss is the data's alone.

A framework's loss is −log p in some units: a mean over tokens in place of a sum, squares in place
of nats, divided by the number of accumulated batches, times the scale of mixed precision. In which
is seen in the backward pass, as its gradient in the outputs of the model beside that of −log p. The
prior's gradient δ (θ − μ)/N is added in the same units, before gradients are accumulated, averaged
over ranks, clipped, or taken in by an optimiser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfac_laplace.curvature.linalg.dtypes import accumulable
from kfac_laplace.curvature.model.forward import as_output
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.marglik.tuner import MarglikTuner

#: Share of the squared gradients of a loss that −log p explains, from which they are the same.
SAME = 0.95
BY_HAND = "Or write the loop with MarglikTuner.loss (docs/tuning.md)"

#: Finds the targets of a batch by the arguments that the model was called with.
Targets = Callable[[Sequence[Any], Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Pass:
    """A training pass of the model, before its backward pass.

    Args:
        direction: the gradient of −log p in the outputs over its norm, shaped as the outputs.
        norm: the norm, float64 ().
        prior: the prior's gradient of each parameter that was not served yet.
    """

    direction: Tensor
    norm: Tensor
    prior: dict[Tensor, Tensor]


class PriorGradients:
    """Hooks on a network that add the prior's gradient to each gradient of its training loss.

    Parameters that a pass does not use get nothing in it, as torch's weight decay has it. A network
    has one such set of hooks: those of a training that broke go where new ones come. Copies of the
    network, which take its hooks along, are left alone.

    Args:
        tuner: whose prior, likelihood and network.
        targets: finds those of the batch that the network was called with.
    """

    _model: nn.Module | None = None  # of a copy

    def __init__(self, tuner: MarglikTuner, targets: Targets):
        self._model, self._tuner, self._targets = tuner.model, tuner, targets
        self._calls: list[bool] = []  # of the model, and whether another was made inside
        self._open: Pass | None = None  # waits for its backward pass
        self._under_way: Pass | None = None
        self._scale: Tensor | None = None
        self._of_data, self._of_all = _nothing(), _nothing()
        self._checked = False
        model = tuner.model
        for other in _at_work_on(model):
            other.close()
        self._on_model = [
            model.register_forward_pre_hook(self._called),
            model.register_forward_hook(self._returned, with_kwargs=True),
        ]
        self._on_parameters: dict[Tensor, RemovableHandle] = {}

    def close(self) -> None:
        """Take the hooks off the network."""
        for handle in [*self._on_model, *self._on_parameters.values()]:
            handle.remove()
        self._on_model, self._on_parameters = [], {}
        self._open = self._under_way = None

    def begin(self) -> None:
        """Before a batch: whatever was left of the one before is forgotten."""
        self._calls, self._open, self._under_way = [], None, None

    def check_first(self) -> None:
        """`check` before the first step; `UnsupportedUse` where the model was not called for it."""
        if not self._on_model:
            raise UnsupportedUse(
                "another callback tunes the same model",
                where=type(self._tuner.model).__name__,
                remedy="Leave one of them out: each would add a prior of its own",
            )
        if self._checked:
            return
        if self._scale is None:
            raise UnsupportedUse(
                "a training step was made without a pass of the model that the callback tunes",
                where=type(self._tuner.model).__name__,
                remedy="Call it in the training step as a module, self(x) and not self.forward(x), "
                f"or name the part that is called: MarglikCallback(model='net'). {BY_HAND}",
            )
        self._checked = True
        self.check()

    def check(self) -> None:
        """Look whether the losses since the last look were those of the likelihood.

        Raises:
            InvalidValue: their gradients in the outputs are no multiples of those of −log p.
        """
        of_data, of_all = float(self._of_data), float(self._of_all)
        self._of_data, self._of_all = _nothing(), _nothing()
        if of_data < SAME * of_all:
            raise InvalidValue(
                f"the training loss is not −log p of {type(self._tuner.likelihood).__name__}: its "
                "gradient in the outputs points elsewhere",
                where="loss",
                got=f"a share of {of_data / of_all:.2g} of its squares that −log p explains",
                remedy="Leave out label smoothing, class weights and mixed labels, or choose the "
                f"likelihood of the loss. {BY_HAND}",
            )

    # --- the passes ----------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a copy of the network: hooks that do nothing."""
        return object.__new__, (PriorGradients,)

    def _trains(self, model: nn.Module) -> bool:
        return model is self._model and model.training and torch.is_grad_enabled()

    def _called(self, model: nn.Module, args: Any) -> None:
        if self._trains(model):
            self._calls.append(False)

    def _returned(self, model: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        if not self._trains(model) or not self._calls:
            return
        around = self._calls.pop()
        if self._calls:
            self._calls[-1] = True
        if around:  # Lightning leads the training step through the module's own forward
            return
        output = as_output(returned, option="MarglikCallback(forward_fn=...)")
        if not output.requires_grad:
            return
        if self._open is not None:
            raise UnsupportedUse(
                "the model was called twice before a backward pass, and which outputs are those of "
                "the loss cannot be told",
                where=type(model).__name__,
                remedy=f"Call it once in a training step, in evaluation mode elsewhere. {BY_HAND}",
            )
        self._open = self._measured(output, self._targets(args, kwargs))
        before_rounding(output, partial(self._arrived, self._open))

    def _measured(self, output: Tensor, target: Tensor) -> Pass:
        """What the backward pass of a loss of these outputs will be compared with."""
        f = accumulable(output.detach()).requires_grad_()
        loss = self._tuner.data_loss(f, target)
        (gradient,) = torch.autograd.grad(loss, f)
        largest = gradient.abs().amax().clamp_min(torch.finfo(gradient.dtype).tiny)
        norm = (gradient / largest).square().sum(dtype=torch.float64).sqrt() * largest
        direction = gradient / norm.clamp_min(torch.finfo(torch.float64).tiny)
        prior = self._tuner.prior_gradient()
        for parameter in prior.keys() - self._on_parameters.keys():
            hook = partial(self._with_prior, parameter)
            self._on_parameters[parameter] = parameter.register_hook(hook)
        return Pass(direction.to(gradient.dtype), norm, prior)

    # --- in the backward pass --------------------------------------------------------------------

    def _arrived(self, made: Pass, gradient: Tensor) -> None:
        """The gradient of the caller's loss has come to the outputs."""
        if made is not self._open:
            return
        along = (gradient * made.direction).sum(dtype=torch.float64)
        # Outputs of no gradient have the units of those before.
        before = torch.zeros_like(along) if self._scale is None else self._scale
        self._scale = torch.where(made.norm > 0, along / made.norm, before)
        self._of_data = self._of_data.to(along.device) + along.square()
        self._of_all = self._of_all.to(along.device) + gradient.double().square().sum()
        self._open, self._under_way = None, made

    def _with_prior(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of a parameter with the prior's part, once in a backward pass."""
        made, scale = self._under_way, self._scale
        prior = None if made is None else made.prior.pop(parameter, None)
        if prior is None or scale is None:
            return gradient
        own = (scale * prior).to(gradient.dtype)
        if gradient.is_sparse:  # a hook may not change that
            own = own.to_sparse(gradient.sparse_dim())
        return gradient + own


def _at_work_on(model: nn.Module) -> list[PriorGradients]:
    """Those whose hooks a network has."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    return [one for one in owners if isinstance(one, PriorGradients) and one._model is model]


def before_rounding(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Have a hook receive the gradient of what a tensor may be the same numbers of in another type.

    Accelerate hands on outputs in single precision, of which the model's own loss knows nothing.
    """
    node, place = output.grad_fn, output.output_nr
    if node is None:  # a parameter
        output.register_hook(hook)
        return
    if node.name().startswith("ToCopyBackward"):
        node, place = node.next_functions[0]
    if node is None:
        return

    def arrived(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if gradient is not None:
            hook(gradient)

    node.register_prehook(arrived)


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")
