"""Second-order methods of other libraries, each with the intervals of ours."""

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

#: Steps between two estimates of curvature, and between two decompositions or inverses.
EVERY, BASES_EVERY = 5, 10
#: Decay of the average of factors.
EMA = 0.95


def lacking(module: str, package: str) -> str | None:
    """Why a library cannot be used, or None."""
    return None if find_spec(module) else f"{package} is not installed"


def shampoo(
    groups: list[dict[str, Any]], *, lr: float, weight_decay: float, beta2: float
) -> Optimizer:
    """Shampoo of `pytorch_optimizer`, grafted to the length of RMSprop, after Google's code."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return ScalableShampoo(
        groups,
        lr=lr,
        betas=(0.9, beta2),
        moving_average_for_momentum=True,
        weight_decay=weight_decay,
        decoupled_weight_decay=True,
        start_preconditioning_step=BASES_EVERY,
        preconditioning_compute_steps=BASES_EVERY,
        statistics_compute_steps=EVERY,
        graft_type=LayerWiseGrafting.RMSPROP,
    )


def asdl_gradients(model: nn.Module, damping: float) -> Callable[[Any, Tensor], None]:
    """What fills `.grad` with gradients preconditioned by ASDL's K-FAC (expand, one MC label).

    Of linear layers and convolutions, the ones that it has Kronecker factors for; all else keeps
    its plain gradients. Labels come from torch's global generator.
    """
    from asdl import FISHER_MC
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    others = [
        layer
        for layer in model.modules()
        if not list(layer.children()) and not isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    config = PreconditioningConfig(
        damping=damping,
        ema_decay=1 - EMA,  # the weight of what is new
        curvature_upd_interval=EVERY,
        preconditioner_upd_interval=BASES_EVERY,
        ignore_modules=others,
    )
    maker = KfacGradientMaker(model, config, fisher_type=FISHER_MC)
    _mark_nothing()

    def gradients(x: Any, y: Tensor) -> None:
        config.data_size = y.numel()  # where it estimates curvature, it divides a sum by this
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(_loss, outputs, y)
        maker.forward_and_backward()

    return gradients


def _mark_nothing() -> None:
    """Let ASDL run on builds without CUDA: there its marks for a profiler (NVTX) raise."""
    if torch.version.cuda is None:
        from asdl.precondition import natural_gradient

        natural_gradient.nvtx = SimpleNamespace(range=lambda name: nullcontext())


def _loss(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The mean loss, or the sum where ASDL asks for it."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction=reduction)
