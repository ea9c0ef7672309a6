"""States as the bytes of a .safetensors file: tensors by name, all else as JSON in its header."""

import hashlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from kfac_laplace.errors import InvalidValue, MissingPackage
from kfac_laplace.states.flat import Flattened
from kfac_laplace.states.stored import REMEDY, Stored, refusing_damage, shown
from kfac_laplace.version import __version__

SUFFIX = ".safetensors"
#: The entry of the header's metadata that is ours.
ENTRY = "kfac_laplace"
#: How states lie in such files, as this version writes and reads it.
LAYOUT = 1
FIELDS = ("layout", "version", "about", "tree", "sha256")
#: A header starts after its length, of so many bytes; no reader takes a longer one.
LENGTH, LONGEST = 8, 100_000_000


def to_bytes(state: Any, about: Mapping[str, Any]) -> bytes:
    """A file with a state.

    Args:
        state: tensors and plain data.
        about: JSON that tells people of it; nothing is read from it.

    Raises:
        MissingPackage: safetensors is not installed.
        InvalidType: a tensor that such files cannot hold.
    """
    package = _package()
    flat = Flattened.of(state)
    header = {"layout": LAYOUT, "version": __version__, "about": about, "tree": flat.tree}
    header["sha256"] = _digest(header)
    text = json.dumps(header, allow_nan=False)
    return package.save(_apart(flat.tensors), {"format": "pt", ENTRY: text})


def from_bytes(data: bytes, where: str) -> Any:
    """The state of a file.

    Args:
        data: the whole file.
        where: its name, for messages.

    Raises:
        MissingPackage: safetensors is not installed.
        InvalidValue: a file that is cut short, damaged, of a later version or of another program.
    """
    package = _package()
    try:
        tensors = package.load(data)
    except MemoryError:
        raise
    except Exception as error:  # its own, and whatever bytes at random do to it
        raise InvalidValue(
            "no .safetensors file: cut short, damaged, or made by another program",
            where=where,
            got=f"{error}",
            remedy="Pass a file that save() made, or an undamaged copy of it",
        ) from None
    return Flattened(tensors, _header(data, where)["tree"].value).state()


def looks_like_one(start: bytes) -> bool:
    """Whether a file with these first bytes may be of the kind: a length, and then JSON."""
    length = int.from_bytes(start[:LENGTH], "little")
    return start[LENGTH : LENGTH + 1] == b"{" and length <= LONGEST


def _header(data: bytes, where: str) -> dict[str, Stored]:
    """Our part of the header, checked."""
    length = int.from_bytes(data[:LENGTH], "little")
    with refusing_damage(where):
        metadata = json.loads(data[LENGTH : LENGTH + length]).get("__metadata__", {})
        if ENTRY not in metadata:
            raise InvalidValue(
                "a .safetensors file of another program",
                where=where,
                got=f"metadata {shown(sorted(metadata))}",
                remedy="Pass a file that save() made",
            )
        header = Stored(json.loads(metadata[ENTRY]), f"{where}, header")
        _check_layout(header)
        found = header.fields(FIELDS)
        content = {name: one.value for name, one in found.items() if name != "sha256"}
        if found["sha256"].text() != _digest(content):
            raise InvalidValue(
                "the header is not the one that was saved",
                where=where,
                got="another checksum",
                remedy=REMEDY,
            )
    return found


def _check_layout(header: Stored) -> None:
    """Raise `InvalidValue` for a file of a later version, whose entries may be any."""
    entries = header.items()
    number = entries["layout"].whole(1) if "layout" in entries else 0
    if number > LAYOUT:
        version = entries["version"].value if "version" in entries else None
        raise InvalidValue(
            "the file was made by a newer version of kfac_laplace",
            where=header.where,
            got=f"layout {number} of version {shown(version)}, where this one reads up to {LAYOUT}",
            remedy="Update kfac_laplace, or save it again with this version",
        )


def _digest(header: Mapping[str, Any]) -> str:
    """SHA-256 of the header without its checksum."""
    return hashlib.sha256(json.dumps(header, allow_nan=False).encode()).hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors no two of which lie in the same memory, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _package() -> ModuleType:
    """`safetensors.torch`, imported when it is used."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackage(
            "safetensors cannot be imported, which files of this kind take",
            where=SUFFIX,
            got=error,
            remedy='Install it: pip install "kfac-laplace[safetensors]"; or save to another '
            "suffix, such as posterior.pt",
        ) from None
    return safetensors.torch
