"""What scikit-learn's estimators of this library share: their parameters, training, and inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.curvature.model.random_states import random_states_kept, seed_everywhere
from kfac_laplace.errors import InvalidType
from kfac_laplace.integrations.tabular import (
    Columns,
    Shuffled,
    Table,
    epochs_for,
    perceptron,
    resolved_dtype,
)
from kfac_laplace.laplace import Laplace
from kfac_laplace.likelihoods import LikelihoodName
from kfac_laplace.marglik.burn_in import BEGINNING
from kfac_laplace.marglik.training import marglik_training
from kfac_laplace.optim import KFAC
from kfac_laplace.options import check_choice, check_positive, check_whole

#: A network, or what makes one from numbers of features and outputs.
Module = nn.Module | Callable[[int, int], nn.Module]
TUNINGS = ("online", "post-hoc", "none")
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "kfac": KFAC,
}
#: Rounds of the tuner in one training.
ROUNDS = 20


class LaplaceEstimator(BaseEstimator):  # type: ignore[misc]  # sklearn has no annotations
    """What both estimators share; not to be used itself.

    Args:
        module: the network: None for a perceptron; a callable that takes numbers of features and
            outputs; or a network, of which a copy is trained from the weights that it has.
        hidden_layer_sizes: widths of the perceptron's hidden layers.
        activation: between them: "silu", "gelu", "tanh" or "relu".
        epochs: passes over the data; None: 1000 steps, and at least 50 epochs.
        batch_size: largest number of examples in a step.
        lr: learning rate, at the start of a cosine schedule that ends at zero.
        optimizer: "adam", "sgd", "kfac", or a class of `torch.optim`.
        tuning: when prior precisions (and σ) are chosen by the evidence: "online" while the network
            trains, "post-hoc" after it, or "none".
        prior_precision: δ at the start, of standardised data. None: 10⁻⁴ n, at most 1.
        prior_structure: how δ is shared; as for `Laplace`.
        hessian_structure: "kron", "ekfac", "diag", "full", "lowrank", or an object; see `Laplace`.
        objective: what tuning maximises; as for `MarglikTuner`.
        calibrate: whether the scale of the posterior is chosen at the end, by leaving out training
            points in turn.
        standardize: whether features, and the targets of a regression, are brought to mean 0 and
            standard deviation 1 before the network sees them.
        random_state: of initial weights, batches and draws. None: another one each time, without a
            look at numpy's global generator.
        device: where the network is, as torch names it; None: the CPU.
        dtype: "float32" or "float64"; None: that of X where it is one of the two, else float64.
    """

    def __init__(
        self,
        module: Module | None = None,
        *,
        hidden_layer_sizes: Sequence[int] = (50, 50),
        activation: str = "silu",
        epochs: int | None = None,
        batch_size: int = 128,
        lr: float = 1e-2,
        optimizer: str | type[torch.optim.Optimizer] = "adam",
        tuning: str = "online",
        prior_precision: float | None = None,
        prior_structure: Any = "layerwise",
        hessian_structure: Structure = "kron",
        objective: Any = "auto",
        calibrate: bool = False,
        standardize: bool = True,
        random_state: Any = None,
        device: Any = None,
        dtype: Any = None,
    ):
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.optimizer = optimizer
        self.tuning = tuning
        self.prior_precision = prior_precision
        self.prior_structure = prior_structure
        self.hessian_structure = hessian_structure
        self.objective = objective
        self.calibrate = calibrate
        self.standardize = standardize
        self.random_state = random_state
        self.device = device
        self.dtype = dtype

    def train(
        self, X: Table, y: NDArray[Any], likelihood: LikelihoodName, n_outputs: int, **noise: float
    ) -> None:
        """Train on a checked table and targets that the likelihood takes; set what is fitted."""
        check_whole("batch_size", self.batch_size, 1)
        check_positive("lr", self.lr)
        check_choice("tuning", self.tuning, TUNINGS)
        device, dtype = torch.device(self.device or "cpu"), resolved_dtype(self.dtype, X.dtype)
        columns = Columns.of(X, self.standardize)
        x = torch.as_tensor(columns.standardized(X), dtype=dtype, device=device)
        targets = torch.as_tensor(y, dtype=dtype if likelihood == "regression" else None)
        seed = self._seed()
        generator = torch.Generator().manual_seed(seed)
        loader = Shuffled(x, targets.to(device), int(self.batch_size), generator)
        epochs = epochs_for(len(loader)) if self.epochs is None else self.epochs
        check_whole("epochs", epochs, 1)
        with random_states_kept(device):
            seed_everywhere(device, seed)
            network = self._network(x.shape[1], n_outputs).to(device, dtype)
            la, _, negative, losses = marglik_training(
                network,
                loader,
                likelihood,
                self.hessian_structure,
                optimizer_cls=self._optimizer(),
                optimizer_kwargs={"lr": self.lr},
                scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
                scheduler_kwargs={"T_max": epochs * len(loader)},
                n_epochs=epochs,
                n_epochs_burnin=0 if self.tuning == "online" else epochs + 1,
                marglik_frequency=max(1, epochs // ROUNDS),
                prior_prec_init=BEGINNING if self.prior_precision is None else self.prior_precision,
                prior_structure=self.prior_structure,
                objective=self.objective,
                seed=seed,
                **noise,  # type: ignore[arg-type]
            )
            if self.tuning == "post-hoc":
                la.optimize_prior(objective=self.objective)
            if self.calibrate:
                la.calibrate()
        self.posterior_: Laplace = la
        self.columns_ = columns
        self.loss_curve_, self.evidence_curve_ = losses, [-value for value in negative]

    def _seed(self) -> int:
        """One of its own for everything that is random in a fit."""
        if self.random_state is None:
            return int(np.random.default_rng().integers(2**31))
        if isinstance(self.random_state, int | np.integer):
            check_random_state(self.random_state)  # its range
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _network(self, n_features: int, n_outputs: int) -> nn.Module:
        """The network to be trained; the caller's stays as it is."""
        if self.module is None:
            return perceptron(n_features, n_outputs, self.hidden_layer_sizes, self.activation)
        if isinstance(self.module, nn.Module):
            return copy.deepcopy(self.module)
        made = self.module(n_features, n_outputs) if callable(self.module) else self.module
        if not isinstance(made, nn.Module):
            raise InvalidType(
                "neither a network nor a callable that makes one",
                where="module",
                got=type(made).__name__,
                remedy="Pass None, a torch.nn.Module, or a function of (n_features, n_outputs)",
            )
        return made

    def _optimizer(self) -> type[torch.optim.Optimizer]:
        if isinstance(self.optimizer, str):
            check_choice("optimizer", self.optimizer, OPTIMIZERS, "pass a class of torch.optim")
            return OPTIMIZERS[self.optimizer]
        if not callable(self.optimizer):
            raise InvalidType(
                "neither a name nor a class of torch.optim",
                where="optimizer",
                got=repr(self.optimizer),
                remedy=f"Choose from {[*OPTIMIZERS]}, or pass a class of torch.optim",
            )
        return self.optimizer

    def inputs(self, X: Any) -> Tensor:
        """New inputs as the network takes them."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        some = next(self.posterior_.model.parameters())
        return torch.as_tensor(self.columns_.standardized(X)).to(some)
