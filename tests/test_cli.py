"""The command line: exit codes, one clear line on bad arguments, help on everything."""

import sys

import pytest

from kfac_laplace import __version__, cli


def outcome(capsys, *arguments):
    """Exit code and what was printed to stdout and stderr."""
    code = cli.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "command"),
        (["paint"], "paint"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "-3"], "at least 1"),
        (["demo", "--seeds", "many"], "many"),
        (["demo", "--seed", "x"], "x"),
        (["demo", "--models", "cnn,rnn"], "rnn"),
        (["demo", "--models", ""], "network"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--unknown"], "--unknown"),
    ],
)
def test_bad_arguments_exit_with_two_and_one_line(capsys, arguments, says):
    code, out, err = outcome(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_device_that_is_not_there(capsys, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    code, _, err = outcome(capsys, "demo", "--device", "cuda")
    assert code == 2
    assert "cuda" in err and len(err.strip().splitlines()) == 1


def test_an_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = outcome(capsys, "demo", "--output", str(tmp_path / "file"))
    assert code == 2
    assert "cannot write" in err and len(err.strip().splitlines()) == 1


def test_missing_packages_name_the_extra(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    code, _, err = outcome(capsys, "demo", "--output", str(tmp_path))
    assert code == 2
    assert "kfac-laplace[demo]" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help(capsys, arguments):
    code, out, _ = outcome(capsys, *arguments)
    assert code == 0 and "demo" in out


def test_version(capsys):
    code, out, _ = outcome(capsys, "--version")
    assert code == 0 and __version__ in out
