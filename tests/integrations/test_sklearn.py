"""`LaplaceClassifier` and `LaplaceRegressor` as users of scikit-learn meet them."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from kfac_laplace.errors import InvalidType, InvalidValue, UnsupportedUse

pytest.importorskip("sklearn", minversion="1.6")
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from kfac_laplace.integrations.sklearn import LaplaceClassifier, LaplaceRegressor

QUICK = {"hidden_layer_sizes": (8,), "epochs": 12, "lr": 3e-2, "random_state": 0}
IRIS, DIABETES = load_iris(return_X_y=True), load_diabetes(return_X_y=True)


def some(data, n=60):
    return data[0][::2][:n], data[1][::2][:n]


# No check is expected to fail. Enough steps for those that ask for accuracy; they make 300 fits.
@pytest.mark.slow
@parametrize_with_checks(
    [
        LaplaceClassifier(hidden_layer_sizes=(10,), epochs=40),
        LaplaceRegressor(hidden_layer_sizes=(10,), epochs=40),
    ]
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", [LaplaceClassifier, LaplaceRegressor])
def test_parameters_are_stored_as_they_are(kind):
    made = kind(lambda d, k: nn.Linear(d, k), epochs=3, prior_structure={"0.*": "diag"})
    copied = clone(made)
    assert copied.get_params().keys() == made.get_params().keys()
    assert copied.set_params(lr=0.5).lr == 0.5
    assert not [name for name in vars(kind(epochs="never checked before fit")) if name[-1] == "_"]


def test_classes_of_any_kind():
    X, codes = some(IRIS)
    names = np.array(["lily", "iris", "rose"])[codes % 2]
    model = LaplaceClassifier(**QUICK).fit(X, names)
    assert list(model.classes_) == ["iris", "lily"]
    probs = model.predict_proba(X)
    assert probs.shape == (60, 2)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-12)
    assert set(model.predict(X)) <= {"iris", "lily"}
    assert model.score(X, names) == np.mean(model.predict(X) == names)
    inputs = torch.as_tensor((X - X.mean(0)) / X.std(0))
    np.testing.assert_allclose(probs, model.posterior_(inputs), rtol=1e-9)


def test_standard_deviations_are_those_of_y_with_its_noise():
    X, y = some(DIABETES)
    model = LaplaceRegressor(**QUICK).fit(X, y)
    mean, std = model.predict(X, return_std=True)
    np.testing.assert_array_equal(model.predict(X), mean)
    inputs = torch.as_tensor((X - X.mean(0)) / X.std(0))
    f, covariance = model.posterior_(inputs)
    np.testing.assert_allclose(mean, y.mean() + y.std() * f[:, 0].numpy(), rtol=1e-9)
    epistemic = y.std() * covariance[:, 0, 0].sqrt().numpy()
    np.testing.assert_allclose(std**2, epistemic**2 + model.sigma_noise_**2, rtol=1e-9)
    sigma = float(model.posterior_.sigma_noise)
    assert model.sigma_noise_ == pytest.approx(sigma * y.std())


def test_a_linear_network_is_bayesian_linear_regression():
    """With a flat prior its mean is that of least squares, its variance that of the normal model.

    20,000 full-batch steps reach the optimum of a quadratic to 1e-5; δ = 1e-9 moves nothing.
    """
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 2)) * [1, 50] + [3, 1000]
    y = X @ [2, -0.1] + rng.normal(size=40)
    options = {"hidden_layer_sizes": (), "hessian_structure": "full", "batch_size": 40}
    model = LaplaceRegressor(
        **options, epochs=600, lr=0.05, tuning="none", prior_precision=1e-9, sigma_noise=0.5
    ).fit(X, y)
    asked = X[:5] + 1
    mean, std = model.predict(asked, return_std=True)
    np.testing.assert_allclose(mean, LinearRegression().fit(X, y).predict(asked), rtol=1e-5)
    design = np.column_stack([X, np.ones(40)])
    rows = np.column_stack([asked, np.ones(5)])
    noise = (0.5 * y.std()) ** 2
    spread = np.einsum("ni,ij,nj->n", rows, np.linalg.inv(design.T @ design), rows)
    np.testing.assert_allclose(std**2, noise * (1 + spread), rtol=1e-5)


def test_several_targets():
    X, y = some(DIABETES)
    targets = np.column_stack([y, 1000 - 5 * y, np.full(60, 7.0)])
    model = LaplaceRegressor(**QUICK).fit(X, targets)
    mean, std = model.predict(X, return_std=True)
    assert mean.shape == std.shape == (60, 3)
    assert model.sigma_noise_.shape == (3,)
    np.testing.assert_allclose(model.sigma_noise_[1], 5 * model.sigma_noise_[0], rtol=1e-9)
    assert model.predict(X[:1]).shape == (1, 3)
    column = clone(model).fit(X, y[:, None])
    assert column.predict(X).shape == (60, 1)


def test_raw_columns_need_no_scaler():
    """Offsets, scales and a constant column change no prediction."""
    X, y = some(IRIS)
    moved = np.column_stack([X * [1e-3, 1, 1e3, 1e6] + [1, 1e5, -1e3, 0], np.full(60, 1e7 + 0.1)])
    plain = LaplaceClassifier(**QUICK).fit(np.column_stack([X, np.zeros(60)]), y)
    other = LaplaceClassifier(**QUICK).fit(moved, y)
    np.testing.assert_allclose(
        other.predict_proba(moved),
        plain.predict_proba(np.column_stack([X, np.zeros(60)])),
        atol=1e-6,
    )
    assert not LaplaceClassifier(**QUICK, standardize=False).fit(X, y).columns_.mean.any()


def test_tuning_moves_what_it_says():
    X, y = some(DIABETES)
    found = {
        tuning: LaplaceRegressor(**{**QUICK, "epochs": 60}, tuning=tuning).fit(X, y)
        for tuning in ("online", "post-hoc", "none")
    }
    assert len(found["online"].evidence_curve_) == 20
    assert found["post-hoc"].evidence_curve_ == found["none"].evidence_curve_ == []
    assert {len(model.loss_curve_) for model in found.values()} == {60}
    delta = {tuning: model.posterior_.prior_precision for tuning, model in found.items()}
    assert bool((delta["none"] == 1e-4 * 60).all())
    assert not bool((delta["post-hoc"] == 1e-4 * 60).any())
    assert float(found["none"].posterior_.sigma_noise) == 1
    for tuning in ("online", "post-hoc"):
        assert float(found[tuning].posterior_.sigma_noise) < 1
    by_hand = LaplaceRegressor(**QUICK, tuning="none", prior_precision=3.0).fit(X, y)
    assert bool((by_hand.posterior_.prior_precision == 3).all())


def test_seeds_and_global_generators():
    X, y = some(IRIS)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first = LaplaceClassifier(**QUICK).fit(X, y).predict_proba(X)
    again = LaplaceClassifier(**QUICK).fit(X, y).predict_proba(X)
    free = LaplaceClassifier(**{**QUICK, "random_state": None})
    other = [free.fit(X, y).predict_proba(X) for _ in range(2)]
    instance = LaplaceClassifier(**{**QUICK, "random_state": np.random.RandomState(0)}).fit(X, y)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(*other) and not np.array_equal(first, instance.predict_proba(X))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])


class Dropping(nn.Module):
    """A network of the user's own, with draws in training."""

    def __init__(self, d, k):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, k))

    def forward(self, x):
        return self.layers(x)


def test_networks_of_ones_own():
    X, y = some(IRIS)
    made = LaplaceClassifier(Dropping, **QUICK).fit(X, y)
    assert isinstance(made.posterior_.model, Dropping)
    torch.manual_seed(0)
    network = Dropping(4, 3)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    whole = LaplaceClassifier(network, **QUICK).fit(X, y)
    first = whole.predict_proba(X)
    np.testing.assert_array_equal(whole.fit(X, y).predict_proba(X), first)  # anew, not further
    assert all(torch.equal(network.state_dict()[name], value) for name, value in kept.items())


@pytest.mark.parametrize("optimizer", ["sgd", "kfac", torch.optim.AdamW])
def test_optimizers(optimizer):
    X, y = some(IRIS)
    model = LaplaceClassifier(**{**QUICK, "optimizer": optimizer, "epochs": 40}).fit(X, y)
    assert model.loss_curve_[-1] < model.loss_curve_[0]


def test_dtypes():
    X, y = some(IRIS)
    for given, dtype, want in (
        (X.astype(np.float32), None, torch.float32),
        (X, None, torch.float64),
        (X.astype(np.float32), "float64", torch.float64),
        (X.round().astype(int), None, torch.float64),
        (X, torch.float32, torch.float32),
    ):
        model = LaplaceClassifier(**{**QUICK, "epochs": 2}, dtype=dtype).fit(given, y)
        assert next(model.posterior_.model.parameters()).dtype is want
        assert model.predict_proba(given).dtype == np.float64


@pytest.mark.parametrize("classes", [2, 7])
def test_probabilities_of_single_precision_sum_to_one_in_double(classes):
    """Else `log_loss` warns that they are none."""
    X, y = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32), np.arange(60) % classes
    probs = LaplaceClassifier(**{**QUICK, "epochs": 2}).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-15 * classes)
    assert log_loss(y, probs) > 0


def test_pickles_predict_the_same():
    X, y = some(DIABETES)
    model = LaplaceRegressor(**QUICK, calibrate=True).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    for mine, theirs in zip(*(m.predict(X, return_std=True) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_searches_and_pipelines():
    X, y = some(IRIS)
    pipeline = make_pipeline(StandardScaler(), LaplaceClassifier(**QUICK))
    grid = {"laplaceclassifier__activation": ["tanh", "relu"]}
    search = GridSearchCV(pipeline, grid, cv=2, scoring="neg_log_loss").fit(X, y)
    assert search.best_params_ in [{"laplaceclassifier__activation": a} for a in ("tanh", "relu")]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_frames_keep_their_names():
    pandas = pytest.importorskip("pandas")
    X, y = some(IRIS)
    frame = pandas.DataFrame(X, columns=list("abcd"))
    model = LaplaceClassifier(**QUICK).fit(frame, pandas.Series(y))
    assert list(model.feature_names_in_) == list("abcd")
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("dcba")])


REFUSED = [
    ({"batch_size": 0}, InvalidValue, "at least 1"),
    ({"epochs": 0}, InvalidValue, "at least 1"),
    ({"lr": -1}, InvalidValue, "positive"),
    ({"tuning": "offline"}, InvalidValue, "'online', 'post-hoc', 'none'"),
    ({"optimizer": "lbfgs"}, InvalidValue, "pass a class of torch.optim"),
    ({"optimizer": torch.optim.LBFGS}, UnsupportedUse, "evaluate the loss again"),
    ({"optimizer": None}, InvalidType, "neither a name nor a class"),
    ({"activation": "sin"}, InvalidValue, "'gelu', 'relu', 'silu', 'tanh'"),
    ({"dtype": "float16"}, InvalidValue, "float32 or float64"),
    ({"module": 3}, InvalidType, "neither a network"),
    ({"module": lambda d, k: None}, InvalidType, "neither a network"),
    ({"prior_precision": -1.0}, InvalidValue, "prior_precision"),
]


@pytest.mark.parametrize(
    ("options", "error", "words"), REFUSED, ids=[str(k) for k in range(len(REFUSED))]
)
def test_options_out_of_range(options, error, words):
    with pytest.raises(error, match=words):
        LaplaceClassifier(**{**QUICK, **options}).fit(*some(IRIS))


def test_data_that_are_none():
    X, y = some(IRIS)
    with pytest.raises(InvalidValue, match="two classes"):
        LaplaceClassifier(**QUICK).fit(X, np.zeros(60))
    with pytest.raises(ValueError, match="NaN"):
        LaplaceRegressor(**QUICK).fit(np.where(X > 5, np.nan, X), y)
    with pytest.raises(NotFittedError):
        LaplaceClassifier(**QUICK).predict(X)
    with pytest.raises(InvalidValue, match="class"):  # three classes, two outputs
        LaplaceClassifier(nn.Linear(4, 2), **QUICK).fit(*[a[::10] for a in IRIS])
