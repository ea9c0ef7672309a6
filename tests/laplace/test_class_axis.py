"""One class axis for a network: settled once, then used everywhere, right against dense algebra."""

from __future__ import annotations

import oracles
import pytest
import torch
from taggers import Last, Tagger, dense_ggn, dense_log_likelihood, labelled

from kfac_laplace import Curvature, Laplace, marglik_training
from kfac_laplace.errors import InvalidValue

C = 3
DELTA = 0.7
axes = pytest.mark.parametrize("axis", [1, -1])


def evidence(model, batches) -> float:
    """log p(D|θ) − ½ [log det(H + δ) − p log δ + δ |θ|²], all dense."""
    h = dense_ggn(model, batches)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    ratio = torch.linalg.slogdet(h / DELTA + torch.eye(len(h), dtype=h.dtype))[1]
    fit = dense_log_likelihood(model, batches).detach()
    return float(fit - 0.5 * (ratio + DELTA * theta.square().sum()))


def fitted(model, batches, **options) -> Laplace:
    return Laplace(model, hessian_structure="full", prior_precision=DELTA, **options).fit(batches)


@axes
@pytest.mark.parametrize("lengths", [(4, 3), (2, 3, 5), (5, 3, 3)])
def test_later_batches_use_the_axis_of_the_first(axis, lengths):
    """Batches with as many positions as classes follow one that has not."""
    model = Tagger(axis)
    batches = [labelled(2, length) for length in lengths]
    la = fitted(model, batches)
    torch.testing.assert_close(la.curvature.blocks["full"].dense(), dense_ggn(model, batches))
    assert float(la.log_marginal_likelihood()) == pytest.approx(evidence(model, batches), rel=1e-10)


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize(("n", "length"), [(2, C), (1, C), (C, C)])
def test_a_first_batch_that_leaves_it_open_is_refused(structure, n, length):
    la = Laplace(Tagger(1), hessian_structure=structure)
    with pytest.raises(InvalidValue, match="class_axis"):
        la.fit([labelled(n, length), labelled(n, length + 1)])
    assert la.n_data == 0
    la.fit([labelled(n, length + 1), labelled(n, length)])


@pytest.mark.parametrize(
    ("axis", "given", "positions"),
    [
        (1, 1, (C,)),
        (1, -2, (C,)),
        (-1, -1, (C,)),
        (-1, 2, (C,)),
        (1, 1, (C, C)),
        (2, 2, (C, C)),
        (2, -2, (C, 2)),
        (-1, 3, (C, C)),
        (1, 1, ()),
    ],
)
def test_the_option_settles_it(axis, given, positions):
    """Also an axis in the middle, which is never guessed."""
    model = Tagger(axis if positions else -1)
    batches = [labelled(2, *positions), labelled(1, *positions)]
    la = fitted(model, batches, class_axis=given)
    torch.testing.assert_close(la.curvature.blocks["full"].dense(), dense_ggn(model, batches))
    x = batches[0][0]
    probabilities = la(x, link_approx="probit")
    mean = Last(model)(x).flatten(0, -2)
    h = dense_ggn(model, batches)
    precision = h + DELTA * torch.eye(len(h), dtype=h.dtype)
    j = oracles.parameter_jacobian(mean, model, oracles.trainable(model))
    variance = (j @ torch.linalg.inv(precision) * j).sum(-1)
    want = (mean / (1 + torch.pi / 8 * variance).sqrt()).softmax(-1)
    got = probabilities.movedim(model.axis, -1).flatten(0, -2)
    torch.testing.assert_close(got, want)
    assert la.predictive_samples(x, 2).shape == (2, *model(x).shape)
    assert la.predict(x, "nn", n_samples=3).probs.shape == model(x).shape


@axes
def test_the_option_contradicts_the_targets(axis):
    with pytest.raises(InvalidValue, match="class_axis"):
        fitted(Tagger(axis), [labelled(2, 4)], class_axis=-axis)


@axes
@pytest.mark.parametrize("method", ["loo", "validation", "gridsearch"])
def test_calibration_reads_outputs_as_the_fit_did(axis, method):
    """κ and δ chosen on batches with as many positions as classes are those of the other layout."""
    torch.manual_seed(3)
    model = Tagger(axis)
    other = Tagger(-axis)
    other.load_state_dict(model.state_dict())
    train = [labelled(6, C), labelled(6, C)]
    held_out = [labelled(5, 3)]

    def chosen(network) -> float:
        la = fitted(network, train, class_axis=network.axis)
        if method == "gridsearch":
            grid = (0.01, 0.1, 1.0, 10.0)
            la.optimize_prior("gridsearch", val_loader=held_out, grid=grid)
            return float(la.prior_precision[0])
        if method == "loo":
            return float(la.calibrate().posterior_scale)
        return float(la.calibrate(held_out, "validation").posterior_scale)

    # The two layouts hold the same numbers; in only one of them is the axis the last.
    assert chosen(model) == pytest.approx(chosen(other), rel=1e-9)


@axes
@pytest.mark.parametrize("method", ["loo", "validation"])
def test_calibration_refuses_labels_in_another_order(axis, method):
    """As many labels, positions exchanged: refused, not reshaped."""
    model = Tagger(axis)
    x, y = labelled(2, 4, 2)
    la = fitted(model, [(x, y)])
    with pytest.raises(InvalidValue, match="target"):
        la.calibrate([(x, y.mT.contiguous())], method)
    assert float(la.posterior_scale) == 1.0


@axes
def test_a_batch_that_contradicts_the_axis_is_an_error(axis):
    """A network has one layout; the refused batch leaves all as it was."""
    model = Tagger(axis)
    curvature = Curvature(model, "classification").fit([labelled(2, 4)])
    before = curvature.n_data
    x, _ = labelled(2, 4)
    with pytest.raises(InvalidValue, match="target"):
        curvature.accumulate(x, torch.zeros(2, C, dtype=torch.long))
    model.axis = -axis
    with pytest.raises(InvalidValue, match="class_axis or an earlier batch"):
        curvature.accumulate(*labelled(2, 4))
    assert curvature.n_data == before


@axes
def test_data_that_are_added_later(axis, tmp_path):
    """To a posterior, to one from a file, and by merging."""
    model = Tagger(axis)
    first, second = [labelled(2, 4)], [labelled(2, 3)]
    want = dense_ggn(model, first + second)
    la = fitted(model, first)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", model)
    for posterior in (la, loaded):
        posterior.fit(second, override=False)
        torch.testing.assert_close(posterior.curvature.blocks["full"].dense(), want)
        torch.testing.assert_close(posterior.fit(second).n_data, 2)  # a refit knows it as well
    one = Curvature(model, "classification", hessian_structure="full").fit(first)
    other = one.empty().fit(second)
    torch.testing.assert_close(one.merge(other).blocks["full"].dense(), want)


def test_outputs_with_two_axes_settle_nothing():
    """A head on one vector, later on sequences: (n, c) says nothing of (n, c, t)."""

    class Both(Tagger):
        def forward(self, x):
            f = self.head(self.body(x).tanh())
            return f.movedim(-1, 1) if f.ndim > 2 else f

    model, flat = Both(1), labelled(3)
    la = fitted(model, [flat])
    with pytest.raises(InvalidValue, match="class_axis"):
        la.fit([labelled(2, 3)], override=False)
    la.fit([labelled(2, 4), labelled(2, 3)], override=False)
    assert la.curvature.ggn.knowledge.axis == 1


def test_curvatures_with_other_axes_do_not_merge():
    model = Tagger(1)
    one = Curvature(model, "classification").fit([labelled(2, 4)])
    model.axis = -1
    other = Curvature(model, "classification").fit([labelled(2, 4)])
    with pytest.raises(InvalidValue, match="class_axis"):
        one.merge(other)


@axes
def test_the_whole_loop_with_the_option(axis):
    """`prepare`, losses, rounds and the final fit on nothing but ambiguous batches."""
    torch.manual_seed(1)
    batches = [labelled(2, C), labelled(2, C)]
    la, model, *_ = marglik_training(
        Tagger(axis), batches, hessian_structure="full", n_epochs=2, class_axis=axis
    )
    torch.testing.assert_close(la.curvature.blocks["full"].dense(), dense_ggn(model, batches))


@pytest.mark.parametrize("likelihood", ["regression", "binary", "poisson", "studentt"])
def test_covariances_of_values_follow_the_option(likelihood):
    """Targets beside outputs: the loss knows no axis, the covariances (n, t, c, c) do."""
    model = Tagger(1)
    x, y = labelled(3, 4, classes=2)
    y = torch.randint(0, 2, (3, C, 4)).double()
    options = {"hessian_structure": "full", "prior_precision": DELTA}
    la = Laplace(model, likelihood, class_axis=1, **options).fit([(x, y)])
    last = Laplace(Last(model), likelihood, **options).fit([(x, y.movedim(1, -1))])
    guessed = Laplace(model, likelihood, **options).fit([(x, y)])
    torch.testing.assert_close(la.log_marginal_likelihood(), last.log_marginal_likelihood())
    torch.testing.assert_close(la.log_marginal_likelihood(), guessed.log_marginal_likelihood())
    got, want = la.predict(x), last.predict(x)
    torch.testing.assert_close(got.covariance, want.covariance)
    torch.testing.assert_close(got.mean, want.mean.movedim(-1, 1))
    assert got.mean.shape == y.shape and got.covariance.shape == (3, 4, C, C)
