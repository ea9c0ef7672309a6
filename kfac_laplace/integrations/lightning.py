"""`MarglikCallback` for Lightning: hyperparameters that choose themselves in `Trainer.fit`."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except Exception:  # builds that do not match raise other errors
        try:
            from pytorch_lightning import Callback
        except Exception as error:
            raise MissingPackage(
                "this callback is for Lightning, which cannot be imported",
                where=__name__,
                got=error,
                remedy='Install it: pip install "kfac-laplace[lightning]"',
            ) from error

#: Strategies that divide a network or its gradients among ranks.
DIVIDING = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}


class MarglikCallback(Callback):
    """Tunes prior precisions and noise while a `Trainer` fits; the module stays as it is.

    `training_step` calls the module (or the part named by `model`) once and returns −log p in any
    units: cross-entropy, squared errors. The callback adds the gradient of the prior in the same
    units, and makes a round after each training epoch. Values are logged as "marglik/...". Where
    the module's one optimiser is a `kfac_laplace.optim.KFAC` (with weight_decay=0), most rounds
    take the curvature that it averages.

    Where several ranks train, each makes the pass over all of the data, and all go on from the
    first one's round: their hyperparameters are equal, and a round takes as long as on one.

    Args:
        likelihood: as for `MarglikTuner`.
        model: name of the attribute of the module that maps inputs to outputs; the module itself,
            or what `KFAC` was given, where it is left out.
        loader: what rounds read; the training data in order where it is left out.
        n_data: number of training examples; that of the training data set where it is left out.
        pass_every: with `KFAC`, of how many rounds one passes over the data; 1 for all.
        watch: called with the tuner's history after each round, such as a `plots.LivePlot`.
        options: those of `MarglikTuner`, but for loss_units, which are the module's, and curvature.

    Raises:
        InvalidType: an option that the module or the trainer decides.
        InvalidValue: an option out of range, once fitting starts.
    """

    def __init__(
        self,
        likelihood: LikelihoodName | Likelihood = "classification",
        *,
        model: str | None = None,
        loader: Iterable[Any] | None = None,
        n_data: int | None = None,
        pass_every: int = 4,
        watch: Watch | None = None,
        **options: Any,
    ):
        check_whole("pass_every", pass_every, 1)
        check_options(options)
        self._likelihood, self._name, self._options = likelihood, model, options
        self._loader, self._n_data = loader, n_data
        self._pass_every, self._watch = pass_every, watch
        self._training: TunedTraining | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._batch: Any = None
        #: At the weights with which fitting ended; None before.
        self.posterior: Laplace | None = None

    @property
    def tuner(self) -> MarglikTuner | None:
        """The tuner, None before fitting has started."""
        return None if self._training is None else self._training.tuner

    # --- fitting -------------------------------------------------------------------------------

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Make the tuner, of the training data."""
        strategies = {one.__name__ for one in type(trainer.strategy).__mro__}
        if strategies & DIVIDING:
            raise UnsupportedUse(
                "curvature and priors are those of a whole network",
                where="strategy",
                got=type(trainer.strategy).__name__,
                remedy="Train on one device, or with strategy='ddp'",
            )
        optimizers, kfac = trainer.optimizers, None
        if len(optimizers) == 1 and isinstance(optimizers[0], KFAC) and self._pass_every > 1:
            kfac = optimizers[0]
        data = TrainingData.of(
            trainer.train_dataloader, self._loader, self._n_data, trainer.world_size
        )
        model = self._model(pl_module, kfac)
        tuner = MarglikTuner(model, self._likelihood, data.n_data, curvature=kfac, **self._options)
        as_trained = TrainingData(AsTrained(trainer, pl_module, data.loader), data.n_data)
        before, resumed = self._training, self._resumed
        if before is not None and resumed is None and before.tuner.model is model:
            if before.epoch == trainer.current_epoch:  # this trainer fits further
                resumed = before.state_dict()
        self._training = TunedTraining(
            tuner, as_trained, self._targets, self._pass_every, self._watch
        )
        if resumed:
            self._training.load_state_dict(resumed)
        self._resumed = None

    def on_train_epoch_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """The round that a checkpoint of a validation's end came before."""
        self._log(pl_module, self._running.catch_up(trainer.current_epoch))

    def on_train_batch_start(
        self, trainer: "Trainer", pl_module: "LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch, whose targets the model is not given."""
        self._batch = batch
        self._running.prior.begin()

    def on_before_optimizer_step(
        self, trainer: "Trainer", pl_module: "LightningModule", optimizer: Any
    ) -> None:
        """Look at the loss before the first step is made with it."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if any(p.grad is not None for p in params):  # there are none where all batches were skipped
            self._running.prior.check_first()

    def on_train_epoch_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Make the epoch's round and log it."""
        self._batch = None
        self._log(pl_module, self._running.end_epoch(trainer.current_epoch + 1))

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Fit the posterior at the last weights."""
        self._running.prior.close()
        self.posterior = self._running.posterior()

    def on_exception(
        self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException
    ) -> None:
        """Leave the module without hooks."""
        if self._training is not None:
            self._training.prior.close()

    # --- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data; from a checkpoint that holds them training goes on as it was."""
        if self._training is None or self._resumed is not None:
            return dict(self._resumed or {})
        return self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state up when fitting starts."""
        self._resumed = state_dict

    # --- pieces --------------------------------------------------------------------------------

    @property
    def _running(self) -> TunedTraining:
        assert self._training is not None  # made in on_train_start
        return self._training

    def _model(self, module: "LightningModule", kfac: KFAC | None) -> nn.Module:
        """The network that is tuned."""
        if self._name is None:
            return module if kfac is None else kfac.model
        found = getattr(module, self._name, None)
        if not isinstance(found, nn.Module):
            raise InvalidValue(
                "no part of the module",
                where="model",
                got=repr(self._name),
                remedy=f"Choose from {[name for name, _ in module.named_children()]}",
            )
        return found

    def _targets(self, args: Any, kwargs: Any) -> Tensor:
        """Those of the present batch."""
        options = self._running.tuner.options
        key = self._options.get("dict_key_y", "labels")
        return split_batch(self._batch, key, options.batch_fn)[1]

    def _log(self, module: "LightningModule", record: Record | None) -> None:
        if record is not None:
            values = {f"marglik/{name}": value for name, value in record.scalars().items()}
            module.log_dict(values, on_step=False, on_epoch=True)


class AsTrained:
    """Batches as a training step receives them: converted, moved, through the module's hooks.

    Args:
        trainer: the trainer.
        module: the module that it fits.
        loader: batches as they are loaded.
    """

    def __init__(self, trainer: "Trainer", module: "LightningModule", loader: Iterable[Any]):
        self._trainer, self._module, self._loader = trainer, module, loader

    def __iter__(self) -> Any:
        """The batches."""
        strategy = self._trainer.strategy
        for batch in self._loader:
            batch = strategy.precision_plugin.convert_input(batch)
            batch = self._module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield strategy.batch_to_device(batch, dataloader_idx=0)
