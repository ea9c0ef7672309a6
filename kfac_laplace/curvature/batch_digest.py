"""By what a batch is known again: kinds and shapes of all of it, and a hash of some entries."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from kfac_laplace.states.plain import LEAVES

#: So many entries of a tensor are hashed, evenly over all of it: a fraction of a millisecond.
ENTRIES = 2**14


def digest(batch: Any) -> int:
    """63 bits that tell a batch from others, as far as some entries of its tensors do.

    Args:
        batch: as a loader yields it.
    """
    found = hashlib.sha256()
    for part in _parts(batch):
        found.update(part)
    return int.from_bytes(found.digest()[:8], "big") >> 1


def _parts(value: Any) -> Iterator[bytes]:
    """What is hashed of a value; of an object of unknown kind, its attributes or its kind alone."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield _some(value.detach())
    elif isinstance(value, numpy.ndarray | numpy.generic):
        yield f"array {value.dtype} {value.shape};".encode()
        flat = numpy.asarray(value).reshape(-1)
        some = flat[:: _step(flat.size)]
        yield repr(some.tolist()).encode() if some.dtype.hasobject else some.tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key, inner in value.items():
            yield f"{key!r};".encode("utf-8", "surrogatepass")
            yield from _parts(inner)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)};".encode()
        for inner in value:
            yield from _parts(inner)
    elif isinstance(value, LEAVES):
        yield f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass")
    else:
        yield f"object {type(value).__qualname__};".encode()
        inside = value.to_dict() if callable(getattr(value, "to_dict", None)) else None
        if isinstance(inside, Mapping):  # graphs of PyTorch Geometric
            yield from _parts(inside)


def _some(tensor: Tensor) -> bytes:
    """Bytes of some entries, in the order of a contiguous tensor."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    count = tensor.numel()
    if count > ENTRIES:
        places = torch.arange(0, count, _step(count), device=tensor.device)
        tensor = tensor.take(places) if tensor.is_contiguous() else tensor.reshape(-1)[places]
    return tensor.resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _step(count: int) -> int:
    """Between entries of which no more than `ENTRIES` are taken."""
    return max(1, -(-count // ENTRIES))
