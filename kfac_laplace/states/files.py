"""Files of states: written as a whole or not at all, read without running what they hold.

A path that ends in .safetensors takes that format, any other torch's; what is read is told apart by
its first bytes.
"""

import contextlib
import errno
import io
import os
import secrets
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.process import own_warnings
from kfac_laplace.states import safetensors_file
from kfac_laplace.states.plain import check_plain

#: Where states are written to and read from: a path, or a file that is open for bytes.
File = str | Path | BinaryIO


def write(state: Any, file: File, about: Mapping[str, Any] | None = None) -> None:
    """Write tensors and plain data so that a path holds them all or what it held before.

    They go to a new file in the same folder, which takes the path's place when all of it is on the
    disk. A link stays one and what it leads to is replaced; permissions stay as they were.

    Args:
        state: tensors and plain data.
        file: a path, or a file open for bytes, to which they are written as they come.
        about: JSON for the header of a .safetensors file, for people; torch's files have no place.

    Raises:
        InvalidType: other data, or neither a path nor a file. Nothing is written.
        MissingPackage: a .safetensors file, and that package is not installed.
        OSError: the folder does not exist or is full, the path is a folder or not writable.
    """
    check_plain(state)
    if not isinstance(file, str | os.PathLike):
        if not hasattr(file, "write") or _is_text(file):
            raise _no_file(file)
        _save(state, file)
    elif is_safetensors(file):
        write_bytes(safetensors_file.to_bytes(state, about or {}), file)
    else:
        _put(lambda opened: _save(state, opened), file)


def is_safetensors(file: object) -> bool:
    """Whether a path asks for a .safetensors file by its suffix."""
    return isinstance(file, str | os.PathLike) and os.fspath(file).lower().endswith(
        safetensors_file.SUFFIX
    )


def write_bytes(data: bytes, path: str | Path) -> None:
    """Write bytes to a path as a whole or not at all, as `write` does."""
    _put(lambda opened: opened.write(data), path)


def _put(fill: Callable[[BinaryIO], object], file: str | Path) -> None:
    """Have a path hold what `fill` writes, or what it held before."""
    path = os.path.realpath(file)
    mode = _mode_of(path)
    if mode is not None and not stat.S_ISREG(mode):  # a pipe or a device has nothing to lose
        with open(path, "wb") as device:
            fill(device)
        return
    with _replacing(path, mode) as fresh:
        fill(fresh)


def write_text(text: str, path: str | Path) -> None:
    """Write a text so that a path holds all of it or what it held before; errors as of `write`."""
    write_bytes(text.encode("utf-8"), path)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file that takes a path's place at the end, or vanishes at an error."""
    real = os.path.realpath(path)
    with _replacing(real, _mode_of(real)) as fresh:
        yield fresh


def rewrite(state: Any, path: str | Path) -> None:
    """As `write` in torch's format, for what is written again and again by work that may be killed.

    The new file beside the path has a name that depends on the path alone, so that a process which
    is killed in the middle leaves one at most, and the next one writes over it.
    """
    check_plain(state)
    real = os.path.realpath(path)
    with _replacing(real, _mode_of(real), beside(real)) as fresh:
        _save(state, fresh)


def beside(path: str | Path) -> str:
    """Where `rewrite` puts what is to take a path's place."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}.tmp")


def check_writable(path: str | Path) -> None:
    """Raise `OSError` where `rewrite` could not put a file: no such folder, a read-only file."""
    _mode_of(os.path.realpath(path))


def _mode_of(path: str) -> int | None:
    """The mode of what may be written over, or None where nothing is; `OSError` where it may not.

    Replacing asks for the folder's permission alone; a file that is read-only is not meant to go.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise FileNotFoundError(errno.ENOENT, "No such folder to save in", folder) from None
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Cannot save to a folder", path)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "Cannot save over a read-only file", path)
    return mode


@contextmanager
def _replacing(path: str, mode: int | None, passing: str | None = None) -> Iterator[BinaryIO]:
    """A new file that takes a path's place at the end, or vanishes at an error.

    Its name is one that nobody has, or `passing`, at which a file is written over.
    """
    folder = os.path.dirname(path)
    once = os.O_TRUNC if passing else os.O_EXCL
    passing = passing or os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    # Created as `open` creates files, with what the umask leaves.
    flags = os.O_WRONLY | os.O_CREAT | once | getattr(os, "O_BINARY", 0)
    descriptor = os.open(passing, flags, 0o666)
    try:
        with open(descriptor, "wb") as fresh:
            if mode is not None:
                os.chmod(passing, stat.S_IMODE(mode))
            yield fresh
            fresh.flush()
            os.fsync(fresh.fileno())
        os.replace(passing, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(passing)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Have the new name on the disk as well, where systems open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Patient:
    """A file for torch's writer, which an exception of `write` would leave in disorder.

    It is kept until the writer has ended.
    """

    def __init__(self, file: Any):
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _save(state: Any, file: Any) -> None:
    """Write to an open file; the file's own errors are raised as they came."""
    patient = _Patient(file)
    try:
        torch.save(state, cast(BinaryIO, patient))
    finally:
        if patient.error is not None:
            raise patient.error


def read(file: File) -> Any:
    """Tensors and plain data, on the CPU. Nothing that a file holds is run.

    Args:
        file: a path, or a file open for bytes.

    Raises:
        FileNotFoundError: and other errors of opening a file, as they come.
        MissingPackage: a .safetensors file, and that package is not installed.
        InvalidValue: what is in it is no such data: cut short, damaged, or of another kind.
        InvalidType: neither a path nor a file.
    """
    with torch.inference_mode(False):  # what was read there may be differentiated elsewhere
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:
                return _loaded(opened, os.fspath(file))
        if not hasattr(file, "read") or _is_text(file):
            raise _no_file(file)
        return _loaded(file, "file")


def _loaded(file: Any, where: str) -> Any:
    start = file.read(safetensors_file.LENGTH + 1)
    file.seek(-len(start), os.SEEK_CUR)
    if safetensors_file.looks_like_one(start):
        return safetensors_file.from_bytes(file.read(), where)
    try:
        with own_warnings():  # of scripted models, which are refused below
            warnings.simplefilter("ignore")
            return torch.load(file, weights_only=True, map_location="cpu")
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # of the disk; EINVAL comes of places in the file that do not exist
    # Not as the error's successor: torch's own tells how to have the file run what it holds.
    raise InvalidValue(
        "no file of tensors and plain data: cut short, damaged, or made by another program",
        where=str(where),
        remedy="Pass a file that save() made, or an undamaged copy of it",
    )


def _is_text(file: object) -> bool:
    """Whether a file is open for text, perhaps inside the wrapper of a temporary one."""
    return isinstance(getattr(file, "file", file), io.TextIOBase)


def _no_file(file: object) -> InvalidType:
    return InvalidType(
        "neither a path nor a file open for bytes",
        where="path",
        got=type(file).__name__,
        remedy="Pass a path, or a file such as open(path, 'wb') or io.BytesIO()",
    )
