"""Files of the safetensors format: read by its package, told apart, refused where foreign."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

from kfac_laplace.errors import InvalidType, InvalidValue, MissingPackage
from kfac_laplace.states import safetensors_file
from kfac_laplace.states.files import is_safetensors, read, write
from kfac_laplace.states.plain import same
from kfac_laplace.version import __version__

safetensors = pytest.importorskip("safetensors")
package = pytest.importorskip("safetensors.torch")

SYMMETRIC = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64) / 3
STATE = {
    "format": 5,
    "sums": {"0.weight": SYMMETRIC, "0.bias": torch.arange(3.0, dtype=torch.float64)},
    "settings": ("expand", None, float("inf"), {3: torch.float32}),
    "twice": [SYMMETRIC, SYMMETRIC[0], SYMMETRIC[:1]],
}


@pytest.fixture
def path(tmp_path):
    write(STATE, tmp_path / "state.safetensors", {"n": 7})
    return tmp_path / "state.safetensors"


def header(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["kfac_laplace"])


def rewritten(path, tensors=None, **changed):
    """A file with another header, whose checksum is right, and other tensors."""
    old = header(path)
    old.pop("sha256")
    new = {name: value for name, value in {**old, **changed}.items() if value is not None}
    new["sha256"] = safetensors_file._digest(new)
    stored = package.load_file(path) if tensors is None else tensors
    package.save_file(stored, path, {"kfac_laplace": json.dumps(new)})


def test_the_state_comes_back(path):
    again = read(path)
    assert same(again, STATE) and list(again) == list(STATE)
    assert type(again["settings"]) is tuple and again["settings"][3] == {3: torch.float32}
    assert again["sums"]["0.weight"].dtype == torch.float64


def test_the_package_reads_tensors_and_header(path):
    """As any program would that knows nothing of us."""
    tensors = package.load_file(path)
    assert {"sums.0.weight", "sums.0.bias", "twice.0", "twice.1", "twice.2"} == {*tensors}
    assert torch.equal(tensors["sums.0.weight"], SYMMETRIC[[0, 1, 1], [0, 0, 1]])
    assert tensors["sums.0.bias"].dtype == torch.bfloat16
    told = header(path)
    assert (told["layout"], told["version"], told["about"]) == (1, __version__, {"n": 7})


def test_open_files_and_other_names(path, tmp_path):
    """What is in a file tells its kind; the suffix counts for what is written."""
    (tmp_path / "renamed.pt").write_bytes(path.read_bytes())
    write(STATE, tmp_path / "torch.pt")
    (tmp_path / "torch.safetensors").write_bytes((tmp_path / "torch.pt").read_bytes())
    for name in ("renamed.pt", "torch.pt", "torch.safetensors"):
        assert same(read(tmp_path / name), STATE)
        assert same(read(io.BytesIO((tmp_path / name).read_bytes())), STATE)
    file = io.BytesIO(b"before" + path.read_bytes())
    file.seek(6)
    assert same(read(file), STATE)
    assert is_safetensors("a/b.SAFETENSORS") and is_safetensors(path)
    assert not is_safetensors("safetensors") and not is_safetensors(file)


# --- written as a whole or not at all ------------------------------------------------------------


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_an_error_at_the_end_leaves_what_was_there(call, path, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(call, fails)
    with pytest.raises(OSError, match="Input/output"):
        write({"new": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert same(read(path), STATE) and os.listdir(path.parent) == [path.name]


def test_what_it_cannot_hold_leaves_what_was_there(path):
    with pytest.raises(InvalidType, match="new: no tensor"):
        write({"new": torch.ones(2).to_sparse()}, path)
    with pytest.raises(InvalidType, match="not plain data"):
        write({"new": {1, 2}}, path)
    assert same(read(path), STATE) and os.listdir(path.parent) == [path.name]


def test_without_the_package(path, monkeypatch):
    """Torch's files go on without it."""
    before = path.read_bytes()
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: write(STATE, path), lambda: read(path), lambda: read(io.BytesIO(before))):
        with pytest.raises(MissingPackage, match=r"pip install.*kfac-laplace\[safetensors\]"):
            use()
    write(STATE, path.with_suffix(".pt"))
    assert same(read(path.with_suffix(".pt")), STATE)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_the_package_is_imported_when_it_is_used():
    code = "import sys, kfac_laplace; sys.exit('safetensors' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what is no such file ------------------------------------------------------------------------


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing of ours")


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "no file of tensors"),
    "a length": (lambda path: path.write_bytes(b"\x40" + bytes(7)), "no file of tensors"),
    "a length and a brace": (lambda path: path.write_bytes(b"\x40" + bytes(7) + b"{"), "no .safe"),
    "no JSON": (lambda path: path.write_bytes(b"\x04" + bytes(7) + b"{..}"), "no .safetensors"),
    "text": (lambda path: path.write_text("A text, and no state.\n" * 30), "no file of tensors"),
    "zip": (zipped, "no file of tensors"),
    "a model's": (
        lambda path: package.save_file({"weight": torch.ones(2)}, path),
        r"file of another program. got metadata \[\]",
    ),
    "another library's": (
        lambda path: package.save_file({"weight": torch.ones(2)}, path, {"format": "pt"}),
        r"file of another program. got metadata \['format'\]",
    ),
    "our word alone": (
        lambda path: package.save_file({}, path, {"kfac_laplace": "yes"}),
        "damaged state",
    ),
    "a list": (lambda path: package.save_file({}, path, {"kfac_laplace": "[]"}), "not a mapping"),
    "no entries": (lambda path: package.save_file({}, path, {"kfac_laplace": "{}"}), "missing"),
    "nested too deep": (
        lambda path: package.save_file({}, path, {"kfac_laplace": "[" * 100_000}),
        "damaged state",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind, tmp_path):
    make, says = FOREIGN[kind]
    make(tmp_path / "file.safetensors")
    with pytest.raises(InvalidValue, match=says) as caught:
        read(tmp_path / "file.safetensors")
    assert "file" in str(caught.value) and len(str(caught.value)) < 600
    with pytest.raises(InvalidValue, match=says):
        read(io.BytesIO((tmp_path / "file.safetensors").read_bytes()))


def test_errors_of_opening_come_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError):
        read(tmp_path / "folder.safetensors")
    with pytest.raises(IsADirectoryError):
        write(STATE, tmp_path / "folder.safetensors")
    with pytest.raises(FileNotFoundError):
        write(STATE, tmp_path / "none" / "state.safetensors")


@pytest.mark.parametrize("part", range(20))
def test_files_that_were_cut_short(part, path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 20])
    with pytest.raises(InvalidValue, match="cut short"):
        read(path)


def test_files_with_more_at_the_end(path):
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InvalidValue, match="no .safetensors file"):
        read(path)


def test_a_changed_header(path):
    whole = path.read_bytes()
    assert whole.count(b'\\"format\\": 5') == 1
    path.write_bytes(whole.replace(b'\\"format\\": 5', b'\\"format\\": 6'))
    with pytest.raises(InvalidValue, match="the header is not the one that was saved"):
        read(path)


def test_any_byte_of_the_header_that_fell_over(path):
    """Refused, or it says the same: of spaces and of names of ours there are several ways."""
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, length, 7):
        bad = bytearray(whole)
        bad[place] ^= 1
        try:
            again = read(io.BytesIO(bytes(bad)))
        except InvalidValue:
            refused += 1
        else:
            assert same(again, STATE)
    assert refused > 150


def test_files_of_a_newer_version(path):
    rewritten(path, layout=2, version="9.1", more="what nobody knows")
    with pytest.raises(InvalidValue, match="newer version.*layout 2 of version '9.1'.*Update"):
        read(path)
    rewritten(path, layout=-1)
    with pytest.raises(InvalidValue, match="layout: a whole number"):
        read(path)


def test_tensors_that_are_missing_too_many_or_others(path):
    tensors = package.load_file(path)
    rewritten(path, tensors | {"more": torch.ones(2)})
    with pytest.raises(InvalidValue, match="more: a tensor belongs to nothing"):
        read(path)
    rewritten(path, {name: one for name, one in tensors.items() if name != "twice.1"})
    with pytest.raises(InvalidValue, match=r"twice\.1: a tensor is missing"):
        read(path)
    rewritten(path, tensors | {"twice.1": tensors["twice.1"].float()})
    with pytest.raises(InvalidValue, match=r"twice\.1: .*torch.float64 is needed.*torch.float32"):
        read(path)
    rewritten(path, tensors | {"twice.1": torch.ones(3).double()})
    with pytest.raises(InvalidValue, match=r"twice\.1: a tensor \(2,\).*got \(3,\)"):
        read(path)
