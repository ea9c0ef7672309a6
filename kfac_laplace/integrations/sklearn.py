"""Estimators of scikit-learn that tune themselves: `LaplaceClassifier` and `LaplaceRegressor`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfac_laplace.curvature.estimate.structures import Structure
from kfac_laplace.errors import InvalidValue, MissingPackage

try:
    from sklearn.base import ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import validate_data
except Exception as error:  # builds that do not match raise other errors
    raise MissingPackage(
        "these estimators are scikit-learn's, which is not installed in a version that they know",
        where=__name__,
        got=error,
        remedy='Install it: pip install "kfac-laplace[sklearn]"',
    ) from error

from kfac_laplace.integrations.estimator import LaplaceEstimator, Module
from kfac_laplace.integrations.tabular import Columns, Table


class LaplaceClassifier(ClassifierMixin, LaplaceEstimator):  # type: ignore[misc]
    """Class probabilities E softmax f(x) under the Laplace posterior of a network.

    A perceptron on standardised features by default, whose prior precisions are tuned by the
    evidence while it trains [ML21]: nothing has to be searched. Two classes have two outputs. All
    arguments are those of `LaplaceEstimator`.

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

    def fit(self, X: Any, y: Any) -> "LaplaceClassifier":
        """Train on features (n, d) and labels (n,)."""
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InvalidValue(
                "a classifier needs two classes at least", where="y", got=f"one class, {classes[0]}"
            )
        self.train(X, codes, "classification", len(classes))
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> Table:
        """Class probabilities (n, classes)."""
        x = self.inputs(X)
        probs: Tensor = self.posterior_(x).double()
        # Scikit-learn's metrics want sums of one in the digits of what they are given.
        return (probs / probs.sum(-1, keepdim=True)).cpu().numpy()

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
        hessian_structure: Structure = "kron",
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
        self.train(X, standard, "regression", table.shape[1], sigma_noise_init=self.sigma_noise)
        self.target_columns_, self._one = targets, y.ndim == 1
        sigma = float(self.posterior_.sigma_noise) * targets.scale
        self.sigma_noise_ = float(sigma[0]) if self._one else sigma
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """E y, and with `return_std` the standard deviation of y, its noise included.

        Shapes (n,), or (n, k) of several targets. The share of the network, of what data left open
        about it, is √(std² − sigma_noise_²).
        """
        x, columns = self.inputs(X), self.target_columns_
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
