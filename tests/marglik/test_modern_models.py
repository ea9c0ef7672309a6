"""Tuning while a transformer trains: as a user's loop has it, wrapped in what users wrap it in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_laplace import Laplace, MarglikTuner, marglik_training

hf = pytest.importorskip("transformers")

CLASSES, N_DATA, T = 3, 12, 6
Batches = list[dict[str, Tensor]]


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=T,
            num_labels=CLASSES,
        )
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            hidden_dropout_prob=0.1,
            num_labels=CLASSES,
        )
    )


def tokens() -> dict[str, Tensor]:
    mask = (torch.arange(T) < torch.randint(2, T + 1, (N_DATA, 1))).long()
    return {"input_ids": torch.randint(1, 11, mask.shape) * mask, "attention_mask": mask}


MODELS = {
    "bert": (bert, tokens),
    "vit": (vit, lambda: {"pixel_values": torch.randn(N_DATA, 3, 8, 8)}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Batches]:
    """A model in training mode and labelled batches of it, seeded."""
    torch.manual_seed(8)
    make, draw = MODELS[name]
    model, x = make().train(), draw()
    y = torch.arange(N_DATA) % CLASSES
    cut = {key: value.split(5) for key, value in {**x, "labels": y}.items()}
    return model, [dict(zip(cut, parts, strict=True)) for parts in zip(*cut.values(), strict=True)]


def train(tuner: MarglikTuner, batches: Batches, epochs: int) -> list[float]:
    """A plain loop; the mean fit to the data of each epoch, without the prior's share."""
    optimiser = torch.optim.Adam(tuner.model.parameters(), lr=0.01)
    fits = []
    for _ in range(epochs):
        total = 0.0
        for batch in batches:
            output, y = tuner.forward(batch)
            loss = tuner.loss(output, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += nn.functional.cross_entropy(output.detach(), y, reduction="sum").item()
        modes = [module.training for module in tuner.model.modules()]
        record = tuner.step(batches)
        assert record is not None and record.evidence < 0
        assert [module.training for module in tuner.model.modules()] == modes
        fits.append(total / N_DATA)
    return fits


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_a_users_loop(name, fisher):
    model, batches = made(name)
    tuner = MarglikTuner(model, "classification", N_DATA, fisher=fisher, n_epochs_burnin=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    fits = train(tuner, batches, epochs=12)
    assert fits[-1] < fits[0]
    assert model.training
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    delta = tuner.hyperparameters()["prior_precision"]
    assert len(delta) == len(tuner.groups) and delta.isfinite().all() and delta.std() > 0
    la = tuner.laplace(batches)
    again = Laplace(model, prior_precision=delta).fit(batches)
    if fisher == "exact":
        torch.testing.assert_close(la.log_marginal_likelihood(), again.log_marginal_likelihood())
    x = {key: value for key, value in batches[0].items() if key != "labels"}
    torch.testing.assert_close(la(x).sum(-1), torch.ones(5))


@pytest.mark.slow
@every_model
def test_training_in_one_call(name):
    model, batches = made(name)
    la, trained, margliks, losses = marglik_training(
        model, batches, n_epochs=8, n_epochs_burnin=4, optimizer_kwargs={"lr": 0.01}
    )
    assert trained is model and model.training
    assert losses[3] < losses[0]  # before the prior moves, which moves the loss as well
    assert len(margliks) == 5 and la.n_data == N_DATA
    assert -float(la.log_marginal_likelihood()) == pytest.approx(margliks[-1], rel=1e-6)


@pytest.mark.slow
@every_model
def test_recomputed_activations_change_nothing(name):
    """Checkpointing, as transformers switches it on, in training and in the curvature pass."""
    found = []
    for recomputed in (False, True):
        model, batches = made(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if recomputed:
            model.activation_checkpointing_enable()
        tuner = MarglikTuner(model, "classification", N_DATA)
        fits = train(tuner, batches, epochs=3)
        found.append([*fits, *(record.evidence for record in tuner.history)])
    # the same float32 sums, recomputed: Adam's first steps magnify what differs in the last digit
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.slow
def test_a_model_in_bfloat16():
    model, batches = made("vit")
    model.bfloat16()
    for batch in batches:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    tuner = MarglikTuner(model, "classification", N_DATA)
    assert tuner.loss(*tuner.forward(batches[0])).dtype == torch.float32
    fits = train(tuner, batches, epochs=12)
    assert fits[-1] < fits[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    """A process group of this process alone, met at a file."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def counting(buckets, bucket):
    """A communication hook that notes down what is handed to it for averaging."""
    # DDP checks the annotations of hooks, which are strings in this file: there are none.
    buckets.append(bucket.index())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_distributed_training_still_averages_gradients(one_process):
    """The loop runs the wrapper: the module inside alone would let the ranks drift apart."""
    model, batches = made("bert")
    wrapped = nn.parallel.DistributedDataParallel(model)
    buckets: list[int] = []
    wrapped.register_comm_hook(buckets, counting)
    tuner = MarglikTuner(wrapped, "classification", N_DATA)
    tuner.loss(*tuner.forward(batches[0])).backward()
    assert buckets
    buckets.clear()
    marglik_training(wrapped, batches, n_epochs=1)
    assert len(buckets) >= len(batches)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's imports
def test_a_distributed_model_has_the_curvature_of_the_model_inside(one_process):
    model, batches = made("bert")
    want = Laplace(model).fit(batches)
    for wrapped in (
        nn.parallel.DistributedDataParallel(model),
        torch.compile(nn.parallel.DistributedDataParallel(model)),
        nn.DataParallel(model),
    ):
        got = Laplace(wrapped).fit(batches)
        assert list(got.coverage) == list(want.coverage)
        assert torch.equal(got.log_marginal_likelihood(), want.log_marginal_likelihood())
        tuner = MarglikTuner(wrapped, "classification", N_DATA)
        record = tuner.step(batches)
        assert record is not None
        assert model.training and wrapped.training
