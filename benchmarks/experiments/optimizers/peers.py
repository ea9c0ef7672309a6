"""Second-order methods of other libraries, each with the intervals of ours."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.experiments.optimizers.task import mean_loss

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
    from pytorch_optimizer.optimizer.shampoo_utils import LayerWiseGrafting

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

    Its factors are sums over positions divided by the length of the first axis; norms get their
    unit-wise blocks only in its other classes, so that all but linear layers and convolutions keep
    their plain gradients. Labels come from torch's global generator.
    """
    from asdl import FISHER_MC
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    others = [
        layer
        for layer in model.modules()
        if not list(layer.children()) and not isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    config = PreconditioningConfig(
        data_size=1,
        damping=damping,
        ema_decay=1 - EMA,
        curvature_upd_interval=EVERY,
        preconditioner_upd_interval=BASES_EVERY,
        ignore_modules=others,
    )
    maker = KfacGradientMaker(model, config, fisher_type=FISHER_MC)

    def gradients(x: Any, y: Tensor) -> None:
        outputs = maker.setup_model_call(model, x)
        maker.setup_loss_call(mean_loss, outputs, y)
        maker.forward_and_backward()

    return gradients
