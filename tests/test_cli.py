"""The command line: exit codes, one clear line on bad arguments, help on everything."""

import signal
import subprocess
import sys
import time

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
        (["demo", "--seed", "-1"], "from 0"),
        (["demo", "--seed", "4294967296"], "from 0"),
        (["demo", "--models", "cnn,rnn"], "rnn"),
        (["demo", "--models", ""], "network"),
        (["demo", "--models", "cnn,cnn"], "once"),
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


@pytest.mark.slow
def test_the_package_does_without_the_packages_of_the_demo():
    code = (
        "import sys, kfac_laplace, kfac_laplace.cli; "
        "print({'matplotlib', 'rich', 'sklearn', 'torchmetrics'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are signals on POSIX only")
def test_an_interrupt_ends_with_130_and_no_traceback(tmp_path):
    pytest.importorskip("sklearn")
    # A parent that runs in the background may have passed on that interrupts are ignored.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kfac_laplace.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    folder = tmp_path / "results"
    running = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--models", "cnn", "--output", str(folder)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        give_up = time.monotonic() + 120
        while not folder.exists() and running.poll() is None and time.monotonic() < give_up:
            time.sleep(0.1)  # the folder is made first, from where on interrupts are caught
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130
    assert err.strip() == "interrupted"
