"""Networks with a Laplace posterior as scikit-learn's estimators, whose hyperparameters choose
themselves: `LaplaceClassifier` and `LaplaceRegressor`.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kfac_laplace.curvature.model.random_states import random_states_kept, seed_everywhere
from kfac_laplace.errors import InvalidType, InvalidValue, MissingPackage
from kfac_laplace.integrations.tabular import (
    Columns,
    Shuffled,
    Table,
    epochs_for,
    perceptron,
    resolved_dtype,
)
from kfac_laplace.laplace import Laplace
from kfac_laplace.marglik.burn_in import BEGINNING
from kfac_laplace.marglik.training import marglik_training
from kfac_laplace.optim import KFAC
from kfac_laplace.options import check_choice, check_positive, check_whole

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MissingPackage(
        "these estimators are scikit-learn's, which is not installed in a version that they know",
        where=__name__,
        got=error,
        remedy='Install it: pip install "scikit-learn>=1.6"',
    ) from error

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
        hessian_structure: "kron", "diag" or "full".
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
        hessian_structure: str = "kron",
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

    def _trained(self, X: Table, y: Table, likelihood: str, n_outputs: int, **noise: float) -> None:
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
                self.hessian_structure,  # type: ignore[arg-type]  # checked there
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
        return self.optimizer

    def _inputs(self, X: Any) -> Tensor:
        """New inputs as the network takes them."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        some = next(self.posterior_.model.parameters())
        return torch.as_tensor(self.columns_.standardized(X)).to(some)


class LaplaceClassifier(ClassifierMixin, LaplaceEstimator):  # type: ignore[misc]
    """Class probabilities E softmax f(x) under the Laplace posterior of a network.

    A perceptron on standardised features by default, whose prior precisions are tuned by the
    evidence while it trains [ML21]: nothing has to be searched. Two classes have two outputs. All
    arguments but the last are those of `LaplaceEstimator`.

    Args:
        link_approx: how probabilities come from the Gaussian over outputs; as for `Laplace`.

    Attributes:
        classes_: labels in the order of the columns of `predict_proba`.
        posterior_: the `Laplace` posterior, for standardised inputs.
        columns_: location and scale of each feature.
        loss_curve_: mean training loss of each epoch.
        evidence_curve_: log evidence of each round of tuning.
        n_features_in_: number of features.

    Raises:
        InvalidValue: an option out of range, or targets of one class.
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
        hessian_structure: str = "kron",
        objective: Any = "auto",
        calibrate: bool = False,
        standardize: bool = True,
        random_state: Any = None,
        device: Any = None,
        dtype: Any = None,
        link_approx: str = "auto",
    ):
        super().__init__(
            module,
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            tuning=tuning,
            prior_precision=prior_precision,
            prior_structure=prior_structure,
            hessian_structure=hessian_structure,
            objective=objective,
            calibrate=calibrate,
            standardize=standardize,
            random_state=random_state,
            device=device,
            dtype=dtype,
        )
        self.link_approx = link_approx

    def fit(self, X: Any, y: Any) -> "LaplaceClassifier":
        """Train on features (n, d) and labels (n,)."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InvalidValue(
                "a classifier needs two classes at least", where="y", got=f"one class, {classes[0]}"
            )
        self._trained(X, codes, "classification", len(classes))
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> Table:
        """Class probabilities (n, classes)."""
        x = self._inputs(X)
        probs: Tensor = self.posterior_(x, link_approx=self.link_approx)
        return probs.double().cpu().numpy()

    def predict(self, X: Any) -> Any:
        """The likeliest class of each row, (n,)."""
        probs = self.predict_proba(X)
        return self.classes_[probs.argmax(1)]


class LaplaceRegressor(RegressorMixin, LaplaceEstimator):  # type: ignore[misc]
    """E y and its standard deviation under the Laplace posterior of a network.

    A perceptron on standardised features and targets by default, whose prior precisions and noise
    are tuned by the evidence while it trains [ML21]: nothing has to be searched. Several targets
    share a network and, in units of their standard deviations, a noise. All arguments but the last
    are those of `LaplaceEstimator`.

    Args:
        sigma_noise: σ at the start, in standard deviations of the targets if these are
            standardised; with tuning="none" it stays.

    Attributes:
        posterior_: the `Laplace` posterior, for standardised inputs and targets.
        sigma_noise_: σ in units of y, a number or one for each target.
        columns_: location and scale of each feature.
        target_columns_: location and scale of each target.
        loss_curve_: mean training loss of each epoch.
        evidence_curve_: log evidence of each round of tuning.
        n_features_in_: number of features.

    Raises:
        InvalidValue: an option out of range.
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
        hessian_structure: str = "kron",
        objective: Any = "auto",
        calibrate: bool = False,
        standardize: bool = True,
        random_state: Any = None,
        device: Any = None,
        dtype: Any = None,
        sigma_noise: float = 1.0,
    ):
        super().__init__(
            module,
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            tuning=tuning,
            prior_precision=prior_precision,
            prior_structure=prior_structure,
            hessian_structure=hessian_structure,
            objective=objective,
            calibrate=calibrate,
            standardize=standardize,
            random_state=random_state,
            device=device,
            dtype=dtype,
        )
        self.sigma_noise = sigma_noise

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> "LaplaceRegressor":
        """Train on features (n, d) and targets (n,) or (n, k)."""
        X, y = validate_data(
            self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True
        )
        table = y[:, None] if y.ndim == 1 else y
        targets = Columns.of(table, self.standardize)
        standard = targets.standardized(table)
        self._trained(X, standard, "regression", table.shape[1], sigma_noise_init=self.sigma_noise)
        self.target_columns_, self._one = targets, y.ndim == 1
        sigma = float(self.posterior_.sigma_noise) * targets.scale
        self.sigma_noise_ = float(sigma[0]) if self._one else sigma
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """E y, and with `return_std` the standard deviation of y, of the noise and of what is
        not known about the network together.

        Shapes (n,), or (n, k) of several targets. That of the network alone is
        √(std² − sigma_noise_²).
        """
        x, columns = self._inputs(X), self.target_columns_
        mean, covariance = (t.double().cpu().numpy() for t in self.posterior_(x))
        means = mean * columns.scale + columns.mean
        means = means[:, 0] if self._one else means
        if not return_std:
            return means
        variance = (
            np.diagonal(covariance, axis1=1, axis2=2) + float(self.posterior_.sigma_noise) ** 2
        )
        std = np.sqrt(variance) * columns.scale
        return means, std[:, 0] if self._one else std
