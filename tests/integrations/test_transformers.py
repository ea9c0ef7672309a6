"""Trainings with the callback are those of a loop over `MarglikTuner.loss`; tiny random models."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch import nn  # noqa: E402 - after the skips
from torch.utils.data import SequentialSampler  # noqa: E402

from kfac_laplace import MarglikTuner  # noqa: E402
from kfac_laplace.errors import InvalidValue  # noqa: E402
from kfac_laplace.integrations.transformers import MarglikCallback  # noqa: E402

TUNED = {"n_epochs_burnin": 1, "n_hypersteps": 3, "tune": "all"}
LENGTHS = (6, 4, 5, 3, 6, 5, 4, 6, 3, 5)
WIDTH, WORDS = 6, 12
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class InOrder(transformers.Trainer):
    """A trainer that does not shuffle."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def sentences(kind):
    """Padded, with labels of the sentence or of its tokens."""
    found = []
    for length in LENGTHS:
        mask = (torch.arange(WIDTH) < length).long()
        ids = torch.randint(1, WORDS, (WIDTH,)) * mask
        labels = {
            "sequence": ids[0] % 3,
            "tokens": (ids % 3).masked_fill(mask == 0, -100),
            "next": ids.masked_fill(mask == 0, -100),
            "number": ids[0].double() / WORDS,
        }[kind]
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def model_for(kind):
    torch.manual_seed(0)
    if kind == "next":
        names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        sizes = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
        config = transformers.GPT2Config(**sizes, **dict.fromkeys(names, 0.0))
        return transformers.GPT2LMHeadModel(config).double()
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=1 if kind == "number" else 3,
        **PLAIN,
    )
    heads = {"tokens": transformers.BertForTokenClassification}
    return heads.get(kind, transformers.BertForSequenceClassification)(config).double()


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def trained(model, data, folder, *callbacks, resume=None, trainer=InOrder, **options):
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.5,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**arguments, **options})
    made = trainer(
        model, arguments, train_dataset=data, callbacks=[*callbacks], optimizers=sgd(model)
    )
    made.train(resume_from_checkpoint=resume)
    return made


def by_hand(model, data, *, of, likelihood="classification", epochs=2, scale):
    """A loop over `MarglikTuner.loss`: so many batches of two a step, clipped as above.

    Args:
        scale: of the model's loss, by the tuner and the labels of a batch and of its step.
    """
    model = deepcopy(model)
    causal = isinstance(model, transformers.GPT2LMHeadModel)
    batches = [
        {name: torch.stack([row[name] for row in data[i : i + 2]]) for name in data[0]}
        for i in range(0, len(data), 2)
    ]

    def split(batch):
        labels = batch["labels"]
        if causal:
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return {name: value for name, value in batch.items() if name != "labels"}, labels

    tuner = MarglikTuner(model, likelihood, len(data), batch_fn=split, **TUNED)
    optimizer, _ = sgd(model)
    for _ in range(epochs):
        model.train()
        for first in range(0, len(batches), of):
            own = [split(batch) for batch in batches[first : first + of]]
            optimizer.zero_grad()
            for x, y in own:
                units = scale(tuner, y, torch.cat([labels for _, labels in own]))
                (units * tuner.loss(model(**x), y)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        tuner.step(batches)
    return model, tuner


def assert_same_training(model, tuner, other, others_tuner, rtol=1e-8, atol=1e-10):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=rtol, atol=atol, msg=name)
    for name, value in others_tuner.hyperparameters().items():
        torch.testing.assert_close(tuner.hyperparameters()[name], value, rtol=rtol, atol=atol)
    assert len(tuner.history) == len(others_tuner.history)


def once(tuner, y, step):
    """A mean over the examples of a batch; the trainer leaves those of a step a sum."""
    return 1.0


def by_tokens(tuner, y, step):
    """A mean over the tokens of a batch, likewise."""
    return len(y) / float((y != -100).sum())


def by_tokens_of_a_step(tuner, y, step):
    """A sum over the tokens of a batch over their number in the step, each sentence's first too."""
    return len(y) / float((step != -100).sum() + len(step))


def by_squares(tuner, y, step):
    """Squares are 2σ² times their nats."""
    return 2 * tuner.hyperparameters()["sigma_noise"] ** 2


@pytest.mark.parametrize(
    ("kind", "likelihood", "scale", "of"),
    [
        ("sequence", "classification", once, 2),
        pytest.param("next", "classification", by_tokens_of_a_step, 2, marks=pytest.mark.slow),
        pytest.param("number", "regression", by_squares, 1, marks=pytest.mark.slow),
        pytest.param("tokens", "classification", by_tokens, 2, marks=pytest.mark.slow),
        pytest.param("next", "classification", by_tokens_of_a_step, 1, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_loop_by_hand(kind, likelihood, scale, of, tmp_path):
    """Five batches, clipped; in steps of two batches the last has one."""
    data, model = sentences(kind), model_for(kind)
    expected = by_hand(model, data, of=of, likelihood=likelihood, scale=scale)
    tunes = MarglikCallback(likelihood, **TUNED)
    trained(model, data, tmp_path, tunes, gradient_accumulation_steps=of)
    single = {"rtol": 1e-5, "atol": 1e-7}  # in which language models compute their loss
    assert_same_training(model, tunes.tuner, *expected, **(single if kind == "next" else {}))
    delta = tunes.tuner.hyperparameters()["prior_precision"]
    assert torch.equal(tunes.posterior.prior_precision, delta)


@pytest.mark.slow
def test_half_precision_rounds_and_no_more(tmp_path):
    """Under autocast the trainer hands on outputs in another type than those of the loss."""
    data, model = sentences("next"), model_for("next").float()
    plain, half = deepcopy(model), deepcopy(model)
    tunes = MarglikCallback(**TUNED), MarglikCallback(**TUNED)
    trained(plain, data, tmp_path, tunes[0], num_train_epochs=1)
    trained(half, data, tmp_path, tunes[1], num_train_epochs=1, bf16=True)
    rounding = {"rtol": 2**-8, "atol": 2**-8}  # of bfloat16
    assert_same_training(half, tunes[1].tuner, plain, tunes[0].tuner, **rounding)
    pairs = zip(plain.parameters(), half.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("saves", [pytest.param("epoch", marks=pytest.mark.slow), "steps"])
def test_resumed_from_a_checkpoint_training_is_the_same_to_the_bit(saves, tmp_path):
    """Checkpoints by steps are older than the round of their epoch; training is shuffled."""
    data, start = sentences("sequence"), model_for("sequence")
    options = {"save_strategy": saves, "save_steps": 5, "trainer": transformers.Trainer}

    def train(resume=None):
        model, tunes = deepcopy(start), MarglikCallback(**TUNED)
        trained(model, data, tmp_path, tunes, resume=resume, num_train_epochs=3, **options)
        return model, tunes.tuner

    whole, tuner = train()
    resumed, others = train(str(tmp_path / "checkpoint-10"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert [record.epoch for record in others.history] == [1, 2, 3]
    assert [r.evidence for r in others.history] == [r.evidence for r in tuner.history]


def test_early_stopping_ends_with_a_posterior(tmp_path):
    data, model, tunes = sentences("sequence"), model_for("sequence"), MarglikCallback(**TUNED)
    stops = transformers.EarlyStoppingCallback(early_stopping_threshold=1e9)  # no gain is enough

    class Evaluated(InOrder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=data, **kwargs)

    chosen = {"metric_for_best_model": "loss", "load_best_model_at_end": True}
    schedule = {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 9}
    made = trained(model, data, tmp_path, tunes, stops, trainer=Evaluated, **chosen, **schedule)
    assert made.state.epoch == len(tunes.tuner.history) == 2
    assert tunes.posterior.n_data == len(data)
    told = [entry for entry in made.state.log_history if "marglik/evidence" in entry]
    assert [entry["marglik/evidence"] for entry in told] == [
        record.evidence for record in tunes.tuner.history
    ]
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.slow
def test_streams_have_rounds_as_often_as_they_end(tmp_path):
    """The trainer counts their epochs in parts of the whole training."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(sentences("sequence"))

    model, tunes = model_for("sequence"), MarglikCallback(n_data=len(LENGTHS), **TUNED)
    trained(model, Stream(), tmp_path, tunes, trainer=transformers.Trainer, max_steps=13)
    assert [record.epoch for record in tunes.tuner.history] == [1, 2]  # of five steps each


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smoothing_factor": 0.1}, "the model was called without labels"),
        ({"resume": "elsewhere"}, "a checkpoint without the callback's state"),
    ],
)
def test_refusals(options, told, tmp_path):
    data, model = sentences("sequence"), model_for("sequence")
    if "resume" in options:
        trained(deepcopy(model), data, tmp_path / "elsewhere", save_strategy="epoch")
        options = {"resume": str(tmp_path / "elsewhere" / "checkpoint-5")}
    with pytest.raises(InvalidValue, match=told):
        trained(model, data, tmp_path / "here", MarglikCallback(), **options)
