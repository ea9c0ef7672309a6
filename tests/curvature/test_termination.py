"""SIGTERM during a fit with a checkpoint: the batch at hand is counted, and the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from cases import build

from kfac_laplace import Checkpoint, Curvature
from kfac_laplace.curvature.live_state import live_to_plain

ROOT = Path(__file__).parents[2]
#: A fit that sends SIGTERM to itself while its second batch is read, or while its model runs.
FIT = """
import os, signal, sys, torch
sys.path.insert(0, "tests")
from cases import build
from kfac_laplace import Checkpoint, Curvature
path, where, before = sys.argv[1:]
case = build("mlp-tanh")
runs = []
class Loader:
    def __iter__(self):
        for k, batch in enumerate(case.batches):
            if where == "loader" and k == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if where == "dead worker" and k == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker is killed by signal: Terminated.")
            yield batch
def hook(module, args, output):
    runs.append(1)
    if where == "model" and len(args[0]) and torch.equal(args[0], case.batches[1][0]):
        os.kill(os.getpid(), signal.SIGTERM)
case.model.register_forward_hook(hook)
def handler(number, frame):
    print("handler", flush=True)
    if before == "exits":
        raise SystemExit(3)
if before == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif before != "default":
    signal.signal(signal.SIGTERM, handler)
curvature = Curvature(case.model, case.likelihood).fit(Loader(), checkpoint=Checkpoint(path))
print("ended", curvature.n_data, signal.getsignal(signal.SIGTERM) is handler, flush=True)
"""


def run(path, where, before="default"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", FIT, str(path), where, before],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def assert_goes_on(path, counted):
    stored = torch.load(path, weights_only=True)
    assert len(stored["pass"]["digests"]) == counted
    case, again = build("mlp-tanh"), build("mlp-tanh")
    wanted = Curvature(case.model, case.likelihood).fit(case.batches)
    found = Curvature(again.model, again.likelihood).fit(again.batches, checkpoint=path)
    assert_same_bits(live_to_plain(found.ggn), live_to_plain(wanted.ggn))


@pytest.mark.slow
@pytest.mark.parametrize(("where", "counted"), [("model", 2), ("loader", 1), ("dead worker", 1)])
def test_the_process_ends_by_the_signal_with_the_batch_at_hand_written(where, counted, tmp_path):
    ended = run(tmp_path / "fit", where)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert ended.stdout == ""
    assert_goes_on(tmp_path / "fit", counted)


@pytest.mark.slow
def test_a_handler_of_the_callers_own_is_called(tmp_path):
    ended = run(tmp_path / "fit", "model", "exits")
    assert ended.returncode == 3, ended.stderr
    assert ended.stdout == "handler\n"
    assert_goes_on(tmp_path / "fit", 2)


@pytest.mark.slow
def test_after_one_that_returns_the_fit_goes_on(tmp_path):
    ended = run(tmp_path / "fit", "model", "returns")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "handler\nended 7 True\n"
    assert not (tmp_path / "fit").exists()


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_so(tmp_path):
    ended = run(tmp_path / "fit", "model", "ignored")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "ended 7 False\n"


# --- handlers ----------------------------------------------------------------------------------


@pytest.fixture
def own():
    """A handler of the caller's."""
    called = []

    def handler(number, frame):
        called.append(number)

    before = signal.signal(signal.SIGTERM, handler)
    yield handler, called
    signal.signal(signal.SIGTERM, before)


def seen_inside(case, path, **options):
    """The handlers at each batch of a fit."""
    found = []

    def loader():
        for batch in case.batches:
            found.append(signal.getsignal(signal.SIGTERM))
            yield batch

    Curvature(case.model, case.likelihood).fit(loader(), checkpoint=path, **options)
    return found


def test_handlers_are_put_back_after_a_fit(own, tmp_path):
    handler, called = own
    inside = seen_inside(build("mlp-tanh"), tmp_path / "fit")
    assert handler not in inside and len(inside) == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not called


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_handlers_are_put_back_after_errors_and_what_was_counted_is_written(own, error, tmp_path):
    handler, _ = own
    case = build("mlp-tanh")

    def loader():
        yield from case.batches[:2]
        raise error

    with pytest.raises(error):
        Curvature(case.model, case.likelihood).fit(loader(), checkpoint=tmp_path / "fit")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert_goes_on(tmp_path / "fit", 2)


def test_an_error_in_the_middle_of_a_batch_leaves_the_batches_before(tmp_path):
    case = build("mlp-tanh")
    bad = [*case.batches[:2], (case.batches[2][0] * float("nan"), case.batches[2][1])]
    with pytest.raises(ValueError, match="finite"):
        Curvature(case.model, case.likelihood).fit(bad, checkpoint=tmp_path / "fit")
    assert_goes_on(tmp_path / "fit", 2)


def test_a_handler_that_somebody_sets_meanwhile_stays(own, tmp_path):
    handler, _ = own
    case = build("mlp-tanh")

    def other(number, frame):
        pass

    def loader():
        yield from case.batches[:2]
        signal.signal(signal.SIGTERM, other)
        yield from case.batches[2:]

    Curvature(case.model, case.likelihood).fit(loader(), checkpoint=tmp_path / "fit")
    assert signal.getsignal(signal.SIGTERM) is other


def test_without_a_checkpoint_no_handler_is_touched(own):
    handler, _ = own
    assert seen_inside(build("mlp-tanh"), None) == [handler] * 3


def test_other_threads_set_no_handlers(own, tmp_path):
    handler, _ = own
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(seen_inside(build("mlp-tanh"), tmp_path / "fit"))
    )
    thread.start()
    thread.join()
    assert found == [handler] * 3


def test_a_failed_write_is_said_and_leaves_the_last_whole_file(tmp_path):
    """A full disk; the folder is taken away here, whoever runs the test."""
    case, folder = build("mlp-tanh"), tmp_path / "folder"
    folder.mkdir()

    def loader():
        yield from case.batches[:2]
        (folder / "fit").unlink()
        folder.rmdir()
        yield from case.batches[2:]

    with pytest.raises(FileNotFoundError):
        Curvature(case.model, case.likelihood).fit(
            loader(), checkpoint=Checkpoint(folder / "fit", every=1)
        )
