"""Fits with the callback are those of a loop over `MarglikTuner.loss`, as the trainer steps."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

L = pytest.importorskip("lightning")

from integrations.lightning_fits import (  # noqa: E402 - after the skip
    QUIET,
    SGD,
    TUNED,
    Module,
    Validated,
    assert_same_training,
    by_hand,
    data,
    fitted,
    loader_of,
)
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from kfac_laplace import Laplace  # noqa: E402
from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse  # noqa: E402
from kfac_laplace.integrations.lightning import MarglikCallback  # noqa: E402
from kfac_laplace.optim import KFAC, Damped  # noqa: E402

# A short loader logs rarely; checkpoints of a test are read in another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def callback(likelihood="classification", **options):
    return MarglikCallback(likelihood, **{**TUNED, **options})


@pytest.mark.parametrize("of", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fit_is_the_loop_by_hand(of, clip):
    """Also where five batches make three steps, the last from one: Lightning divides it by two."""
    module, dataset, tunes = Module(), data(), callback()
    expected = by_hand(module, dataset, of=of, clip=clip)
    fitted(module, dataset, tunes, accumulate_grad_batches=of, gradient_clip_val=clip)
    assert_same_training(module, tunes.tuner, *expected)
    assert torch.equal(
        tunes.posterior.prior_precision, tunes.tuner.hyperparameters()["prior_precision"]
    )


def test_squared_errors_are_the_likelihood_in_other_units():
    """A mean of squares over two outputs is σ² nats of an example, as σ moves."""
    module, dataset, tunes = Module(2, F.mse_loss), data("regression"), callback("regression")
    units = lambda tuner: tuner.hyperparameters()["sigma_noise"] ** 2  # noqa: E731 - in place
    expected = by_hand(module, dataset, "regression", units=units)
    fitted(module, dataset, tunes)
    assert_same_training(module, tunes.tuner, *expected)
    assert float(tunes.tuner.hyperparameters()["sigma_noise"]) != 1.0


def test_half_precision_is_the_loop_by_hand_in_half_precision():
    """Weights of single precision, outputs of bfloat16, whose eight bits round gradients."""
    module, tunes, (x, y) = Module(), callback(), data().tensors
    dataset = TensorDataset(x.float(), y)
    expected = by_hand(module, dataset, dtype=torch.bfloat16)
    fitted(module, dataset, tunes, precision="bf16-mixed")
    assert_same_training(module, tunes.tuner, *expected, rtol=2**-8, atol=2**-8)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["training", "validation"])
def test_resumed_from_a_checkpoint_training_is_the_same_to_the_bit(at, tmp_path):
    """A checkpoint of the end of validation is older than the round of its epoch.

    Lightning reads it before it makes a module double, so that this one is double before.
    """
    adam, dataset = partial(torch.optim.Adam, lr=0.05), data()
    start, val = Validated(optimizer=adam).double().state_dict(), loader_of(data(n=6))

    def fit(folder, ckpt_path=None):
        module, tunes = Validated(optimizer=adam).double(), MarglikCallback(tune="all")
        module.load_state_dict(start)
        saves = ModelCheckpoint(
            tmp_path / folder,
            filename="{epoch}",
            save_top_k=-1,
            save_on_train_epoch_end=at == "training",
            enable_version_counter=False,
        )
        options = {"enable_checkpointing": True, "callbacks": [saves], "val": val}
        fitted(module, dataset, tunes, epochs=8, ckpt_path=ckpt_path, **options)
        return module, tunes.tuner

    whole, tuner = fit("whole")
    resumed, others = fit("resumed", tmp_path / "whole" / "epoch=5.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert [record.epoch for record in others.history] == [*range(1, 9)]
    pairs = zip(tuner.history, others.history, strict=True)
    assert all(one.evidence == other.evidence for one, other in pairs)
    delta = tuner.hyperparameters()["prior_precision"]
    assert torch.equal(others.hyperparameters()["prior_precision"], delta)


def test_a_trainer_that_fits_further_goes_on():
    module, dataset, tunes = Module(), data(), callback()
    expected = by_hand(module, dataset, epochs=4)
    trainer = fitted(module, dataset, tunes, epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader_of(dataset))
    assert_same_training(module, tunes.tuner, *expected)


@pytest.mark.slow
def test_two_ranks_train_as_one_and_agree(tmp_path):
    """Batches of three on each of two ranks are batches of six; 24 examples divide evenly."""
    module, dataset = Module().double(), data(n=24)
    torch.save({"weights": module.state_dict(), "data": dataset}, tmp_path / "start.pt")
    script, out = Path(__file__).with_name("ddp_fit.py"), tmp_path / "rank{rank}.pt"
    path = os.pathsep.join([str(script.parents[1]), str(script.parents[2])])
    command = [sys.executable, str(script), str(tmp_path / "start.pt"), str(out)]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, cwd=tmp_path, check=True, timeout=300)
    expected, tuner = by_hand(module, dataset, batch_size=6)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in expected.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-9, atol=1e-10)
    assert ranks[0]["evidence"] == ranks[1]["evidence"]
    for name, value in tuner.hyperparameters().items():
        first, second = (rank["hyperparameters"][name] for rank in ranks)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, value, rtol=1e-9, atol=1e-10)
    assert [rank["n_data"] for rank in ranks] == [24, 24]


def test_early_stopping_looks_at_what_is_logged(tmp_path):
    module, dataset, tunes = Module(), data(), callback()
    stops = EarlyStopping("marglik/log_likelihood", patience=0, mode="min")  # at the first rise
    logger = CSVLogger(tmp_path)
    trainer = fitted(
        module, dataset, tunes, epochs=20, callbacks=[stops], logger=logger, log_every_n_steps=1
    )
    assert trainer.current_epoch == len(tunes.tuner.history) < 20
    assert isinstance(tunes.posterior, Laplace)
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    head = logged.splitlines()[0].split(",")
    assert {"marglik/evidence", "marglik/prior_precision/net.0.weight"} <= {*head}


def test_kfac_as_the_optimiser_lends_its_curvature():
    """One round of four passes over the data, and the first of all."""
    module, dataset = Module(), data()
    made = {"lr": 0.05, "weight_decay": 0, "rule": Damped()}
    module.made = lambda parameters: KFAC(module, "classification", **made)
    tunes = callback()
    fitted(module, dataset, tunes, epochs=6)
    assert [record.shared for record in tunes.tuner.history] == [False, True, True, True] + [
        False,
        True,
    ]
    module.made(None).close()


def test_a_part_of_the_module_may_be_named():
    module, dataset, tunes = Module(), data(), callback(model="net")
    expected = by_hand(module, dataset)
    fitted(module, dataset, tunes)
    assert tunes.tuner.groups == ("0.weight", "2.weight")
    assert_same_training(module, tunes.tuner, *expected)


def test_shuffled_training_draws_what_it_draws_without_the_callback():
    """Rounds read the data in order, by no random number of training."""
    dataset, seen = data(), []

    class Watching(Module):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0][0, 0].item())
            return super().training_step(batch, batch_idx)

    for callbacks in (callback(), L.Callback()):
        torch.manual_seed(1)
        loader = DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)
        fitted(Watching(), dataset, callbacks, loader=loader)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_hooks_are_gone_after_a_fit_and_after_a_failure():
    module, dataset = Module(), data()
    fitted(module, dataset, callback())
    assert hooks(module) == 0

    class Broken(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("half-way")
            return super().training_step(batch, batch_idx)

    broken = Broken()
    with pytest.raises(RuntimeError, match="half-way"):
        fitted(broken, dataset, callback())
    assert hooks(broken) == 0


def test_batches_may_be_skipped_from_the_first_on():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    tunes = callback()
    with pytest.warns(UserWarning, match="returned `None`"):
        fitted(Skips(), data(), tunes)
    assert len(tunes.tuner.history) == 3


def hooks(module):
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    return modules + sum(len(p._backward_hooks or ()) for p in module.parameters())


def test_the_older_package_takes_it_as_well():
    """`pytorch_lightning` has classes of its own; its trainer asks callbacks for no descent."""
    pl = pytest.importorskip("pytorch_lightning")

    class Older(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.loss, self.made = net, F.cross_entropy, SGD

        forward, training_step = Module.forward, Module.training_step
        configure_optimizers = Module.configure_optimizers

    newer, dataset, tunes = Module(), data(), callback()
    expected = by_hand(newer, dataset)
    module = Older(newer.net)
    trainer = pl.Trainer(**QUIET, precision="64-true", max_epochs=3, callbacks=[tunes])
    trainer.fit(module, loader_of(dataset))
    assert_same_training(module, tunes.tuner, *expected)


# --- refusals -------------------------------------------------------------------------------------


class Smoothed(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y, weight=torch.tensor([0.1, 1.0, 5.0]).double())


class Twice(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy((self(x) + self(-x)) / 2, y)


class NotCalled(Module):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.forward(x), y)


@pytest.mark.parametrize(
    ("module", "error", "told"),
    [
        (Smoothed, InvalidValue, "the training loss is not"),
        (Twice, UnsupportedUse, "called twice before a backward pass"),
        (NotCalled, UnsupportedUse, "without a pass of the model"),
    ],
)
def test_losses_that_are_no_likelihood_are_refused_before_the_first_step(module, error, told):
    module, dataset = module().double(), data()
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(error, match=told):
        fitted(module, dataset, callback())
    assert all(map(torch.equal, module.parameters(), before))
    assert hooks(module) == 0


def test_data_that_do_not_tell_their_number_ask_for_it():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data())

    module, loader = Module(), DataLoader(Stream(), batch_size=5)
    with pytest.raises(InvalidValue, match=r"n_data.*Pass MarglikCallback\(n_data=...\)"):
        fitted(module, None, callback(), loader=loader)
    tunes = callback(n_data=23)
    fitted(module, None, tunes, loader=loader)
    assert tunes.posterior.n_data == 23


def test_options_that_others_decide_are_refused():
    with pytest.raises(InvalidType, match="loss_units"):
        MarglikCallback(loss_units="residuals")
    with pytest.raises(InvalidType, match="read all of the data"):
        MarglikCallback(process_group="world")
    with pytest.raises(InvalidValue, match="no part of the module"):
        fitted(Module(), data(), callback(model="nett"))
