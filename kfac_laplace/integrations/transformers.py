"""`MarglikCallback` for transformers: hyperparameters that choose themselves in `Trainer.train`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace.curvature.model.batches import split_batch
from kfac_laplace.errors import InvalidValue, MissingPackage, UnsupportedUse
from kfac_laplace.integrations.training_data import TrainingData
from kfac_laplace.integrations.tuned_training import TunedTraining, Watch, check_options
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import Likelihood, LikelihoodName
from kfac_laplace.marglik.record import Record
from kfac_laplace.marglik.tuner import MarglikTuner
from kfac_laplace.optim import KFAC
from kfac_laplace.options import check_whole
from kfac_laplace.states.files import read, write

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
else:
    try:
        from transformers import TrainerCallback
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except Exception as error:  # builds that do not match raise other errors
        raise MissingPackage(
            "this callback is for transformers, which cannot be imported",
            where=__name__,
            got=error,
            remedy='Install it: pip install "kfac-laplace[transformers]"',
        ) from error

#: Of a checkpoint's folder.
FILE = "marglik.pt"
#: The label of positions that have none.
IGNORED = -100


class MarglikCallback(TrainerCallback):
    """Tunes prior precisions and noise while a `Trainer` trains: `trainer.add_callback(...)`.

    The loss is the model's own, of the "labels" that it is called with. The callback adds the
    gradient of the prior in the same units, and makes a round after each epoch. Its values are in
    `trainer.state.log_history` as "marglik/...". Checkpoints hold its state, in "marglik.pt", and
    resuming from one takes it up. Language models that predict the next token are tuned on shifted
    labels. Ranks and `KFAC` are as for Lightning's callback.

    Args:
        likelihood: as for `MarglikTuner`: "regression" where labels are numbers.
        loader: what rounds read; the training data in order where it is left out.
        n_data: number of training examples; that of the training data set where it is left out.
        pass_every: with `KFAC`, of how many rounds one passes over the data; 1 for all.
        watch: called with the tuner's history after each round.
        options: those of `MarglikTuner`, but for loss_units and curvature.

    Raises:
        InvalidType: an option that the model or the trainer decides.
        InvalidValue: an option out of range, once training starts.
    """

    def __init__(
        self,
        likelihood: LikelihoodName | Likelihood = "classification",
        *,
        loader: Iterable[Any] | None = None,
        n_data: int | None = None,
        pass_every: int = 4,
        watch: Watch | None = None,
        **options: Any,
    ):
        check_whole("pass_every", pass_every, 1)
        check_options(options)
        self._likelihood, self._options = likelihood, options
        self._loader, self._n_data = loader, n_data
        self._pass_every, self._watch = pass_every, watch
        self._training: TunedTraining | None = None
        #: At the weights with which training ended; None before.
        self.posterior: Laplace | None = None

    @property
    def tuner(self) -> MarglikTuner | None:
        """The tuner, None before training has started."""
        return None if self._training is None else self._training.tuner

    # --- training ------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Make the tuner, of the training data; take up the state of a checkpoint."""
        check_arguments(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
        kfac = optimizer if isinstance(optimizer, KFAC) and self._pass_every > 1 else None
        data = TrainingData.of(
            kwargs["train_dataloader"], self._loader, self._n_data, args.world_size
        )
        options = dict(self._options)
        if predicts_next(model) and "batch_fn" not in options:
            options["batch_fn"] = next_tokens
        tuner = MarglikTuner(model, self._likelihood, data.n_data, curvature=kfac, **options)
        self._training = TunedTraining(tuner, data, self._targets, self._pass_every, self._watch)
        if state.global_step:
            self._resume(args, state)

    def on_epoch_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """The round that a checkpoint of an epoch's last step came before."""
        ended = round(state.epoch or 0)
        if abs((state.epoch or 0) - ended) < 1e-9:
            self._note(state, self._running.catch_up(ended))

    def on_pre_optimizer_step(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Look at the loss before the first step is made with it."""
        self._running.prior.check_first()

    def on_epoch_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Make the epoch's round, unless training stopped inside it."""
        ended = round(state.epoch or 0)
        if abs((state.epoch or 0) - ended) < 1e-9:
            self._note(state, self._running.end_epoch(ended))
        elif not (control.should_training_stop or control.should_epoch_stop):
            # Data that do not know their number: the trainer takes all steps for one epoch.
            self._note(state, self._running.end_epoch(self._running.epoch + 1))

    def on_save(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Put the state into the checkpoint."""
        if state.is_world_process_zero:
            write(self._running.state_dict(), checkpoint_of(args, state) / FILE)

    def on_train_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Fit the posterior at the last weights, or the best where the trainer has loaded these."""
        self._running.prior.close()
        self.posterior = self._running.posterior()

    # --- pieces --------------------------------------------------------------------------------

    @property
    def _running(self) -> TunedTraining:
        assert self._training is not None  # made in on_train_begin
        return self._training

    def _targets(self, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """Those that the model was called with."""
        key = self._options.get("dict_key_y", "labels")
        if kwargs.get(key) is None:
            raise InvalidValue(
                "the model was called without labels, so that another computes the loss",
                where=f"key '{key}'",
                got=sorted(kwargs),
                remedy="Leave out label_smoothing_factor and compute_loss_func: the loss is to be "
                "the model's own",
            )
        return split_batch(dict(kwargs), key, self._running.tuner.options.batch_fn)[1]

    def _resume(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Take up the state of the checkpoint that is resumed."""
        folders, given = [checkpoint_of(args, state)], args.resume_from_checkpoint
        if isinstance(given, str):
            folders.append(Path(given))
        found = [folder / FILE for folder in folders if (folder / FILE).exists()]
        if not found:
            raise InvalidValue(
                "training goes on from a checkpoint without the callback's state",
                where=FILE,
                got=f"nothing in {', '.join(str(folder) for folder in folders)}",
                remedy="Resume from a checkpoint in output_dir that was saved with the callback",
            )
        self._running.load_state_dict(read(found[0]))

    def _note(self, state: "TrainerState", record: Record | None) -> None:
        if record is not None:
            values = {f"marglik/{name}": value for name, value in record.scalars().items()}
            entry: Any = {"epoch": state.epoch, "step": state.global_step, **values}
            state.log_history.append(entry)


def check_arguments(args: "TrainingArguments") -> None:
    """Raise `UnsupportedUse` where a network is divided or copied among devices."""
    got = None
    if args.fsdp:
        got = "fsdp"
    elif args.deepspeed:
        got = "deepspeed"
    elif args.n_gpu > 1:
        got = f"torch.nn.DataParallel over {args.n_gpu} devices"
    if got is not None:
        raise UnsupportedUse(
            "curvature and priors are those of a whole network",
            where="TrainingArguments",
            got=got,
            remedy="Train on one device (CUDA_VISIBLE_DEVICES=0), or by torchrun with one each",
        )


def checkpoint_of(args: "TrainingArguments", state: "TrainerState") -> Path:
    """The folder of the checkpoint of a step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def predicts_next(model: nn.Module) -> bool:
    """Whether a model shifts the labels to those of the next token."""
    base: Any = getattr(model, "get_base_model", None)  # of adapters
    inner = model if base is None else base()
    named = type(inner).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return named or getattr(inner, "loss_type", None) == "ForCausalLM"


def next_tokens(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Inputs, and at each position the label of the next."""
    labels = F.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:]
    return {name: value for name, value in batch.items() if name != "labels"}, labels
