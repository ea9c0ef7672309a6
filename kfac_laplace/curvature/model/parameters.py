"""Parameters that cannot be treated, told by name before anything runs."""

import sys
from collections.abc import Iterable, Mapping
from itertools import chain

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kfac_laplace.errors import UnsupportedUse


def check_usable(model: nn.Module) -> None:
    """Parameters have shapes, are whole, and may enter a graph.

    Raises:
        UnsupportedUse: lazy modules that have not run yet, parameters of which each process has a
            part, or parameters made in inference mode.
    """
    _check_whole(model)
    named = (model.named_parameters(), model.named_buffers())
    lazy = [name for name, tensor in chain(*named) if is_lazy(tensor)]
    if lazy:
        raise UnsupportedUse(
            "lazy modules have no shapes before they first run",
            where=_listed(lazy),
            remedy="Run the model once on a batch",
        )
    inferred = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if inferred:
        raise UnsupportedUse(
            "parameters made in inference mode have no gradients",
            where=_listed(inferred),
            remedy="Make or load the model outside of torch.inference_mode, or pass "
            "copy.deepcopy(model), made outside of it",
        )


def _check_whole(model: nn.Module) -> None:
    """Raise `UnsupportedUse` for a model that is divided between processes.

    Of what nobody has imported there are no objects: looking would cost half a second.
    """
    kinds = (
        ("torch.distributed.tensor", "DTensor"),
        ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    )
    tensor, wrapper = (getattr(sys.modules.get(module), name, ()) for module, name in kinds)
    divided = [name for name, p in model.named_parameters() if isinstance(p, tensor)]
    wrapped = [name or "model" for name, m in model.named_modules() if isinstance(m, wrapper)]
    if divided or wrapped:
        raise UnsupportedUse(
            "curvature is that of whole layers, and each process has a part of them",
            where=_listed(divided or wrapped),
            got="DTensor parameters" if divided else "FullyShardedDataParallel",
            remedy="Load torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) into a model of whole layers, and "
            "divide the data between processes instead, by process_group",
        )


def check_real(parameters: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedUse` for complex parameters among those that gradients are wanted for.

    Curvature and prior are those of real numbers: of a complex parameter they would lose the
    imaginary part.
    """
    found = [name for name, parameter in parameters.items() if parameter.is_complex()]
    if found:
        raise UnsupportedUse(
            "complex parameters have no real curvature",
            where=_listed(found),
            got=parameters[found[0]].dtype,
            remedy="Keep real and imaginary parts in a real parameter (..., 2) and use "
            "torch.view_as_complex of it, which is exact; or leave it out by requires_grad_(False) "
            "or subset_of_weights",
        )


def _listed(names: Iterable[str], most: int = 5) -> str:
    """Names as messages show them, the first few."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
