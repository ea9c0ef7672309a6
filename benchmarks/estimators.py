"""The estimators beside scikit-learn's own, by their defaults, over random splits.

    python -m benchmarks.estimators [--splits N] [--only NAME ...] [--output FILE]

Test NLL in nats and accuracy or R² of each method on a quarter of the data, means over splits with
standard errors. Seeds of the splits are 0, 1, … The others have their defaults behind a
`StandardScaler` (forests without one), with iterations to converge in, 5,000 at most; Gaussian
processes have an RBF kernel, for regression with a length for each feature and a noise. Needs the
extra [sklearn].
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import BayesianRidge, LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.experiments.tables import markdown
from kfac_laplace.integrations.sklearn import LaplaceClassifier, LaplaceRegressor
from kfac_laplace.states.files import write_text

#: Smallest probability that counts, so that one sure error does not decide a mean.
LEAST = 1e-6
CLASSES: dict[str, Callable[[], Any]] = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
}
VALUES: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "diabetes": lambda seed: datasets.load_diabetes(return_X_y=True),
    "friedman1": lambda seed: datasets.make_friedman1(300, noise=1, random_state=seed),
    "friedman2": lambda seed: datasets.make_friedman2(300, noise=50, random_state=seed),
    "friedman3": lambda seed: datasets.make_friedman3(300, noise=0.1, random_state=seed),
}
TOO_MANY = 1000  # examples for a Gaussian process of several classes


def classifiers(n: int, seed: int) -> dict[str, Any]:
    """Unfitted classifiers for n examples."""
    found = {
        "Laplace": LaplaceClassifier(random_state=seed),
        "linear": _scaled(LogisticRegression(max_iter=5000)),
        "perceptron": _scaled(MLPClassifier(max_iter=2000, random_state=seed)),
        "forest": RandomForestClassifier(random_state=seed),
    }
    if n < TOO_MANY:
        found["Gaussian process"] = _scaled(GaussianProcessClassifier(RBF(), random_state=seed))
    return found


def regressors(features: int, seed: int) -> dict[str, Any]:
    """Unfitted regressors; the Gaussian process on standardised targets."""
    kernel = ConstantKernel() * RBF(np.ones(features)) + WhiteKernel()
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)
    return {
        "Laplace": LaplaceRegressor(random_state=seed),
        "linear": _scaled(BayesianRidge()),
        "perceptron": _scaled(MLPRegressor(max_iter=5000, random_state=seed)),
        "forest": RandomForestRegressor(random_state=seed),
        "Gaussian process": _scaled(process),
    }


def _scaled(estimator: Any) -> Any:
    return make_pipeline(StandardScaler(), estimator)


def runs(name: str, seed: int) -> list[dict[str, Any]]:
    """A row for each method on one split of one data set."""
    of_classes = name in CLASSES
    if of_classes:
        X, y = CLASSES[name](return_X_y=True)  # type: ignore[call-arg]
    else:
        X, y = VALUES[name](seed)
    X, X_test, y, y_test = train_test_split(
        X, y, test_size=0.25, random_state=seed, stratify=y if of_classes else None
    )
    methods = classifiers(len(X), seed) if of_classes else regressors(X.shape[1], seed)
    rows = []
    for method, estimator in methods.items():
        begun = time.process_time()
        estimator.fit(X, y)
        seconds = time.process_time() - begun
        score = nll_of_classes if of_classes else nll_of_values
        rows.append(
            {
                "data": name,
                "split": seed,
                "method": method,
                "nll": score(estimator, X_test, y_test),
                "score": float(estimator.score(X_test, y_test)),
                "seconds": seconds,
            }
        )
    return rows


def nll_of_classes(estimator: Any, X: Any, y: Any) -> float:
    """Mean NLL of labels, probabilities kept above `LEAST`."""
    probs = estimator.predict_proba(X).clip(LEAST)
    return float(log_loss(y, probs / probs.sum(1, keepdims=True), labels=estimator.classes_))


def nll_of_values(estimator: Any, X: Any, y: Any) -> float | None:
    """Mean NLL of Gaussians; None where there is no standard deviation."""
    try:
        mean, std = estimator.predict(X, return_std=True)
    except TypeError:
        return None
    return float(np.mean(0.5 * ((y - mean) / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)))


def table(rows: list[dict[str, Any]]) -> str:
    """NLL ± standard error and, in brackets, the mean score, by data set and method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for data in dict.fromkeys(row["data"] for row in rows):
        for method in methods:
            own = [row for row in rows if (row["data"], row["method"]) == (data, method)]
            if own:
                cells[data][method] = _cell(own)
    lines = [[data, *[cells[data].get(method, "") for method in methods]] for data in cells]
    return markdown(["data", *methods], lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    score = f"({statistics.mean(row['score'] for row in rows):.3f})"
    values = [row["nll"] for row in rows]
    if None in values:
        return score
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {error:.3f} {score}"


def main() -> None:
    """Print a line for each run and the table at the end; write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*CLASSES, *VALUES])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.only or [*CLASSES, *VALUES]:
        for seed in range(options.splits):
            for row in runs(name, seed):
                rows.append(row)
                print(row, flush=True)
    print(table(rows))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(rows, indent=1) + "\n", options.output)


if __name__ == "__main__":
    main()
