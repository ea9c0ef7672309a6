"""`marglik_training` that was interrupted in steps and in rounds ends at the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_laplace import Checkpoint, Curvature, marglik_training
from kfac_laplace.errors import InvalidType, InvalidValue
from kfac_laplace.optim import KFAC
from kfac_laplace.states.files import read, write

ROOT = Path(__file__).parents[2]
MOVES = {"n_epochs_burnin": 1, "tune": "all"}


class Interrupted(Exception):
    pass


class Dying:
    """A loader that dies before it yields its k-th batch, counted over all that reads it."""

    def __init__(self, loader, k):
        self.loader, self.left, self.generator = loader, k, loader.generator

    def __iter__(self):
        for batch in self.loader:
            if not self.left:
                raise Interrupted
            self.left -= 1
            yield batch


def made(own=None):
    torch.manual_seed(7)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
    )
    data = TensorDataset(torch.randn(14, 4), torch.randint(0, 3, (14,)))
    generator = None if own is None else torch.Generator().manual_seed(own)
    return model, DataLoader(data, 5, shuffle=True, generator=generator)


def train(model, loader, path=None, n_epochs=3, **options):
    return marglik_training(
        model, loader, n_epochs=n_epochs, checkpoint=path, **{**MOVES, "lr_hyp": 0.3, **options}
    )


def result(la, model, margliks, losses):
    return [la.state_dict(), dict(model.state_dict()), margliks, losses, torch.get_rng_state()]


KINDS = {
    "adam": {},
    "schedule": {
        "scheduler_cls": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_kwargs": {"T_max": 9},
        "keep": "best",
    },
    "kfac": {"optimizer_cls": KFAC, "optimizer_kwargs": {"lr": 0.05}, "fisher": "mc"},
    "ekfac": {"hessian_structure": "ekfac"},
}


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, 3])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in ("schedule", "ekfac") else k for k in KINDS],
)
def test_interrupted_before_batches_of_steps_and_rounds(kind, own, tmp_path):
    options = KINDS[kind]
    model, loader = made(own)
    wanted = result(*train(model, loader, **options))
    counting = Dying(made(own)[1], 10**9)
    train(made(own)[0], counting, **options)
    for k in range(4, 10**9 - counting.left, 2 if own is None else 5):
        path = tmp_path / f"{k}"
        model, loader = made(own)
        with pytest.raises(Interrupted):
            train(model, Dying(loader, k), Checkpoint(path, every=2), **options)
        model, loader = made(own)
        if path.exists():
            torch.manual_seed(99)  # all that is drawn is the file's
        assert_same_bits(result(*train(model, loader, path, **options)), wanted, f"batch {k}")
        assert [*tmp_path.iterdir()] == []


def test_without_interruption_nothing_differs(tmp_path):
    wanted = result(*train(*made()))
    for place in (tmp_path / "a", Checkpoint(tmp_path / "b", every=1)):
        assert_same_bits(result(*train(*made(), place)), wanted)
    assert [*tmp_path.iterdir()] == []


def test_a_longer_training_goes_on_from_a_file_that_was_kept(tmp_path):
    wanted = result(*train(*made(), n_epochs=4))
    place = Checkpoint(tmp_path / "kept", keep=True)
    train(*made(), place, n_epochs=2)
    assert_same_bits(result(*train(*made(), place, n_epochs=4)), wanted)
    with pytest.raises(InvalidValue, match="n_epochs: the checkpoint is of a longer training"):
        train(*made(), place, n_epochs=3)


def test_an_error_in_the_middle_of_a_step_leaves_the_steps_before(tmp_path):
    """Weights may be half new then; the file has those after the last whole step."""

    class Failing(torch.optim.SGD):
        left = 4

        def step(self, closure=None):
            super().step(closure)
            if not self.left:
                raise Interrupted
            Failing.left -= 1

    options = {"optimizer_kwargs": {"lr": 0.05}}
    wanted = result(*train(*made(), optimizer_cls=torch.optim.SGD, **options))
    place = Checkpoint(tmp_path / "file", every=1)
    with pytest.raises(Interrupted):
        train(*made(), place, optimizer_cls=Failing, **options)
    Failing.left = -1
    found = result(*train(*made(), place, optimizer_cls=Failing, **options))
    assert_same_bits(found, wanted)


@pytest.fixture
def path(tmp_path):
    model, loader = made()
    with pytest.raises(Interrupted):
        train(model, Dying(loader, 8), Checkpoint(tmp_path / "file", every=1))
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": "best"}, "keep: the checkpoint is of another training"),
        ({"optimizer_cls": torch.optim.SGD}, "optimizer: the checkpoint"),
        ({"scheduler_cls": torch.optim.lr_scheduler.ConstantLR}, "scheduler: the checkpoint"),
        ({"kfac_approx": "expand"}, "kfac_approx"),
        ({"tune": "auto"}, "tune"),
    ],
)
def test_other_options_are_refused(path, options, says):
    held = path.read_bytes()
    model, loader = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidValue, match=says):
        train(model, loader, path, **options)
    assert_same_bits(dict(model.state_dict()), before)
    assert path.read_bytes() == held


def test_other_models_and_data_are_refused(path):
    model, loader = made()
    with pytest.raises(InvalidValue, match="model: the checkpoint is of another training"):
        train(nn.Sequential(nn.Linear(4, 3)), loader, path)
    x, y = loader.dataset.tensors
    with pytest.raises(InvalidValue, match=r"not those of the training.*batch 1 of other content"):
        train(model, DataLoader(TensorDataset(x + 1, y), 5, shuffle=True), path)
    with pytest.raises(InvalidValue, match="n_data"):
        train(made()[0], DataLoader(TensorDataset(x[:9], y[:9]), 5, shuffle=True), path)


def test_files_of_others_are_refused(path):
    whole = path.read_bytes()
    model, loader = made()
    fit = Curvature(model, "classification").fit([*loader]).state_dict()
    for write_it in (
        lambda: path.write_bytes(whole[: len(whole) // 2]),
        lambda: write(fit, path),
        lambda: write({**read(path), "best": 3}, path),
    ):
        path.write_bytes(whole)
        write_it()
        with pytest.raises(InvalidValue):
            train(*made(), path)
    path.write_bytes(whole)
    with pytest.raises(InvalidValue, match="a checkpoint of training"):
        Curvature(model, "classification").fit(loader, checkpoint=path)


def test_a_state_that_no_file_holds_is_said_before_training(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    model, loader = made()
    with pytest.raises(InvalidType, match="not plain data"):
        train(model, loader, tmp_path / "file", optimizer_cls=Odd, optimizer_kwargs={"lr": 0.1})


SENDS = """
import os, signal, sys
sys.path.insert(0, "tests")
from marglik.test_interrupted_loops import made, train
class Sends:
    reads = 0
    def __init__(self, loader): self.loader = loader
    def __iter__(self):
        Sends.reads += 1
        for k, batch in enumerate(self.loader):
            # 1 counts, 2 prepares, 3 trains, 4 is the round of the first epoch.
            if Sends.reads == int(sys.argv[2]) and k == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
model, loader = made()
train(model, Sends(loader), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("read_of", "steps"), [(3, 1), (4, 3), (5, 1)])
def test_sigterm_in_a_step_and_in_a_round(read_of, steps, tmp_path):
    path = tmp_path / "file"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", SENDS, str(path), str(read_of)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert len(read(path)["training"]["digests"]) == steps
    wanted = result(*train(*made()))
    assert_same_bits(result(*train(*made(), path)), wanted)


def test_sigterm_between_epochs(tmp_path):
    """A handler that raises, as some launchers set, while the next epoch's first batch is read."""

    class Stopped(Exception):
        pass

    class Sends:
        reads = 0

        def __init__(self, loader):
            self.loader, self.generator = loader, loader.generator

        def __iter__(self):
            self.reads += 1
            if self.reads == 5:  # counts, prepares, trains, the round, trains
                os.kill(os.getpid(), signal.SIGTERM)
            yield from self.loader

    def handler(number, frame):
        raise Stopped

    wanted = result(*train(*made(2)))
    before = signal.signal(signal.SIGTERM, handler)
    try:
        model, loader = made(2)
        with pytest.raises(Stopped):
            train(model, Sends(loader), tmp_path / "file")
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    stored = read(tmp_path / "file")["training"]
    assert (stored["epoch"], len(stored["digests"])) == (2, 0)
    assert_same_bits(result(*train(*made(2), tmp_path / "file")), wanted)
