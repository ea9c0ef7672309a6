"""Files: written as a whole or not at all, read as plain data or refused."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.states import files
from kfac_laplace.states.files import read, write

GOOD = {"good": torch.arange(5.0)}
NEW = {"new": torch.arange(4000.0), "more": torch.arange(4000.0)}


def holds(path, state) -> bool:
    found = read(path)
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)


@pytest.fixture
def path(tmp_path):
    """A good file alone in its folder."""
    write(GOOD, tmp_path / "state.pt")
    return tmp_path / "state.pt"


@pytest.mark.parametrize("kind", [str, Path, os.PathLike])
def test_any_kind_of_path(kind, path):
    name = str(path) if kind is str else path
    write(NEW, name)
    assert holds(name, NEW) and os.listdir(path.parent) == ["state.pt"]


def test_a_relative_path(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    write(NEW, "state.pt")
    write(NEW, "other.pt")
    assert holds("state.pt", NEW) and holds(path.parent / "other.pt", NEW)


def test_open_files():
    file = io.BytesIO()
    write(NEW, file)
    file.seek(0)
    assert holds(file, NEW)


@pytest.mark.parametrize("file", [3, None, 2.5, ["state.pt"]])
def test_what_is_no_file(file):
    for use in (lambda: write(NEW, file), lambda: read(file)):
        with pytest.raises(InvalidType, match="path"):
            use()


# --- what fails leaves what was there ------------------------------------------------------------


class Full(Exception):
    """Stands for any error on the way."""


class Interrupting:
    """A disk that has no more room after some bytes, or is interrupted there."""

    def __init__(self, file, after: int, error: BaseException):
        self.file, self.left, self.error = file, after, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return self.file.write(data)


@pytest.mark.parametrize("error", [Full("now"), KeyboardInterrupt(), OSError(28, "No space left")])
@pytest.mark.parametrize("after", [0, 100, 20_000])
def test_an_error_half_way(after, error, path, monkeypatch):
    real = open
    monkeypatch.setattr(
        "builtins.open",
        lambda file, *rest: (
            Interrupting(real(file, *rest), after, error)
            if isinstance(file, int)
            else real(file, *rest)
        ),
    )
    with pytest.raises(type(error)):
        write(NEW, path)
    monkeypatch.undo()
    assert holds(path, GOOD) and os.listdir(path.parent) == ["state.pt"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.chmod"])
def test_an_error_at_the_end(call, path, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(call, fails)
    with pytest.raises(OSError, match="Input/output"):
        write(NEW, path)
    monkeypatch.undo()
    assert holds(path, GOOD) and os.listdir(path.parent) == ["state.pt"]


def test_a_disk_without_room(path):
    """Its like: the system's limit on the size of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write({"new": torch.zeros(9000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert holds(path, GOOD) and os.listdir(path.parent) == ["state.pt"]


@pytest.mark.parametrize(
    "inner", [lambda x: x, open, {1, 2}, io.BytesIO(), torch.float64.__class__, nn.Linear(1, 1)]
)
def test_what_is_no_plain_data_is_refused_before_anything_is_written(inner, path):
    with pytest.raises(InvalidType, match=r"state\.new\.x\[1\]"):
        write({"new": {"x": [1, inner]}}, path)
    assert holds(path, GOOD) and os.listdir(path.parent) == ["state.pt"]


def test_folders_that_are_missing_and_paths_that_are_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        write(NEW, tmp_path / "none" / "state.pt")
    with pytest.raises(IsADirectoryError):
        write(NEW, tmp_path)
    with pytest.raises(IsADirectoryError):
        write(NEW, "")
    assert os.listdir(tmp_path) == []


def test_a_read_only_file_is_not_replaced(path, monkeypatch):
    """For the superuser nothing is read-only: the system's answer is given for it."""
    path.chmod(0o444)
    if os.access(path, os.W_OK):
        monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError):
        write(NEW, path)
    assert holds(path, GOOD) and os.listdir(path.parent) == ["state.pt"]


# --- what is beside the contents -----------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_permissions_stay(mode, path):
    path.chmod(mode)
    write(NEW, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode and holds(path, NEW)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_new_files_have_the_permissions_of_any_new_file(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write(NEW, tmp_path / "state.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == mode


def test_links_stay_links(path, tmp_path):
    (tmp_path / "far").mkdir()
    link, second, dangling = (tmp_path / "far" / name for name in ("link", "second", "dangling"))
    link.symlink_to(path)
    second.symlink_to(link)
    dangling.symlink_to(tmp_path / "later.pt")
    write(NEW, second)
    write(NEW, dangling)
    assert link.is_symlink() and second.is_symlink() and dangling.is_symlink()
    assert not path.is_symlink() and holds(path, NEW) and holds(tmp_path / "later.pt", NEW)
    assert sorted(os.listdir(tmp_path / "far")) == ["dangling", "link", "second"]


def test_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        write(NEW, tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


def test_devices_are_written_to(tmp_path):
    write(NEW, os.devnull)
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


# --- reading -------------------------------------------------------------------------------------


class Malicious:
    """Runs a command when it is read."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing of ours")


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("A text, and no state.\n" * 30),
    "jpeg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(range(256))),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "zip": zipped,
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a pickle that runs code": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "a file that runs code": lambda path: torch.save({"a": Malicious()}, path),
    "a model": lambda path: torch.save(nn.Linear(2, 2), path),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind, tmp_path, monkeypatch):
    """Nothing is run, and nothing of torch's own words on how to have it run is passed on."""
    monkeypatch.chdir(tmp_path)
    FOREIGN[kind](tmp_path / "file.pt")
    for file in (tmp_path / "file.pt", io.BytesIO((tmp_path / "file.pt").read_bytes())):
        with pytest.raises(InvalidValue, match="no file of tensors") as caught:
            read(file)
        assert caught.value.__cause__ is None and caught.value.__context__ is None
        assert "weights_only" not in str(caught.value) and "globals" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file.pt"]


def test_a_scripted_model(tmp_path, monkeypatch):
    """torch warns of such files before it refuses them."""
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        for name in ("constants.pkl", "data.pkl", "version", "code/model.py"):
            archive.writestr(f"archive/{name}", "3\n")
    with pytest.raises(InvalidValue, match="no file of tensors") as caught:
        read(tmp_path / "file.pt")
    assert caught.value.__context__ is None


@pytest.mark.parametrize("part", range(20))
def test_files_that_were_cut_short(part, path):
    write(NEW, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 20])
    with pytest.raises(InvalidValue, match="cut short"):
        read(path)


def test_errors_of_opening_come_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


# --- written again and again ---------------------------------------------------------------------


def test_what_is_rewritten_is_whole_and_leaves_one_name_at_most(tmp_path, monkeypatch):
    """A kill in the middle leaves a file of a known name, which the next write takes."""
    path = tmp_path / "state"
    files.rewrite({"a": torch.ones(3)}, path)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "unlink", killed)  # a dead process cleans nothing
        for _ in range(3):
            with pytest.raises(Killed):
                files.rewrite({"a": torch.zeros(300)}, path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".state.tmp", path]
    assert str(tmp_path / ".state.tmp") == files.beside(path)
    assert torch.equal(files.read(path)["a"], torch.ones(3))
    files.rewrite({"a": torch.zeros(2)}, path)
    assert [*tmp_path.iterdir()] == [path]
    assert torch.equal(files.read(path)["a"], torch.zeros(2))


def test_a_link_stays_one_when_rewritten(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "state")
    files.rewrite([1], link)
    assert link.is_symlink()
    assert files.read(tmp_path / "there" / "state") == [1]


def test_what_cannot_be_rewritten_is_said(tmp_path):
    with pytest.raises(InvalidType, match="not plain"):
        files.rewrite({"a": object()}, tmp_path / "state")
    for path, error in [
        (tmp_path / "none" / "state", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ]:
        with pytest.raises(error):
            files.rewrite({}, path)
        with pytest.raises(error):
            files.check_writable(path)
    assert [*tmp_path.iterdir()] == []
