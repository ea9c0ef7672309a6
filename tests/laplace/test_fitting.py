"""What `fit` reads: any iterable of batches, in any order and size, added or replaced."""

import oracles
import pytest
import torch
from cases import build
from posterior import dense
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from kfac_laplace import Laplace

STRUCTURES = ("kron", "diag", "full")
NAMES = ("mlp-tanh", "mlp-regression", "cnn", "tokens", "vit")
# Sums of seven examples in another order, through log-determinants of at most 150 dimensions.
SAME = {"rtol": 1e-10, "atol": 1e-9}


def evidence(la):
    return la.log_marginal_likelihood().detach()


def fit(case, batches, **options):
    return Laplace(case.model, case.likelihood, **options).fit(batches)


def chunks(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_batch_size_and_order_leave_the_evidence(name, structure):
    case = build(name)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    x, y = case.x, case.y
    expected = evidence(fit(case, [(x, y)], hessian_structure=structure))
    for batches in (
        case.batches,
        case.batches[::-1],
        chunks(x, y, [1] * 7),
        chunks(x[order], y[order], [2, 5]),
    ):
        got = evidence(fit(case, batches, hessian_structure=structure))
        torch.testing.assert_close(got, expected, **SAME)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_halves_added_equal_the_whole(name, structure):
    """`override=False` adds data: evidence, predictive and count."""
    case = build(name)
    whole = fit(case, case.batches, hessian_structure=structure)
    halves = fit(case, case.batches[:1], hessian_structure=structure)
    assert halves.n_data == 3
    assert halves.fit(case.batches[1:], override=False) is halves
    assert halves.n_data == whole.n_data == 7
    torch.testing.assert_close(evidence(halves), evidence(whole), **SAME)
    torch.testing.assert_close(halves(case.x), whole(case.x), **SAME)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merged_curvature_has_the_wholes_evidence(structure):
    """Raw sums with counts: two ranks' curvatures add up."""
    case = build("cnn")
    whole = fit(case, case.batches, hessian_structure=structure)
    first = fit(case, case.batches[:2], hessian_structure=structure)
    second = fit(case, case.batches[2:], hessian_structure=structure)
    merged = first.curvature.merge(second.curvature)
    assert merged is first.curvature and merged.n_data == 7
    torch.testing.assert_close(first.log_det_ratio, whole.log_det_ratio, **SAME)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fitting_again_replaces(structure):
    case = build("mlp-tanh")
    la = fit(case, case.batches[:1], hessian_structure=structure)
    before = evidence(la)
    la.fit(case.batches)
    assert la.n_data == 7
    assert not torch.isclose(evidence(la), before)
    expected = evidence(fit(case, case.batches, hessian_structure=structure))
    torch.testing.assert_close(evidence(la), expected, **SAME)


def test_fit_follows_the_weights_of_the_day():
    """The posterior belongs to the weights at `fit`; training further asks for another fit."""
    case = build("mlp-tanh")
    la = fit(case, case.batches)
    with torch.no_grad():
        case.model[0].weight.mul_(1.5)
    la.fit(case.batches)
    torch.testing.assert_close(evidence(la), evidence(fit(case, case.batches)), **SAME)


class Stream(IterableDataset):
    """A data set without a length."""

    def __init__(self, case):
        self.case = case

    def __iter__(self):
        yield from zip(self.case.x, self.case.y, strict=True)


def test_n_is_counted_from_what_is_seen():
    """A peer takes N = len(dataset): wrong with drop_last, an error for iterable data sets."""
    case = build("mlp-tanh")
    loader = DataLoader(TensorDataset(case.x, case.y), batch_size=3, drop_last=True)
    dropped = fit(case, loader)
    assert dropped.n_data == 6
    expected = evidence(fit(case, [(case.x[:6], case.y[:6])]))
    torch.testing.assert_close(evidence(dropped), expected, **SAME)

    streamed = fit(case, DataLoader(Stream(case), batch_size=2))
    assert streamed.n_data == 7
    torch.testing.assert_close(evidence(streamed), evidence(fit(case, case.batches)), **SAME)


def test_a_generator_is_enough():
    case = build("mlp-tanh")
    streamed = fit(case, (batch for batch in case.batches))
    torch.testing.assert_close(evidence(streamed), evidence(fit(case, case.batches)), **SAME)


class Keyed(nn.Module):
    """A model of the Hugging Face kind: takes its inputs by keyword, returns logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *, features):
        return self.net(features)


@pytest.mark.parametrize("label", ["labels", "target"])
def test_mappings_carry_their_target_under_a_key(label):
    """`dict_key_y` (default "labels") is the target; the other entries go to the model."""
    case = build("mlp-tanh")
    expected = fit(case, case.batches)
    model = Keyed(case.model)
    batches = [{"features": x, label: y} for x, y in case.batches]
    options = {} if label == "labels" else {"dict_key_y": label}
    la = Laplace(model, "classification", **options).fit(batches)
    assert la.n_data == 7
    torch.testing.assert_close(evidence(la), evidence(expected), **SAME)
    torch.testing.assert_close(la({"features": case.x}), expected(case.x), **SAME)


def test_progress_bar_changes_nothing(capsys):
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood).fit(case.batches, progress_bar=True)
    assert capsys.readouterr().err
    quiet = fit(case, case.batches)
    assert not capsys.readouterr().err
    torch.testing.assert_close(evidence(la), evidence(quiet), rtol=0, atol=0)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_other_fishers_fit_reproducibly(fisher):
    """Labels come from `seed`, not from the global generator, and differ between batches."""
    case = build("mlp-tanh")
    state = torch.get_rng_state()
    first, again = (fit(case, case.batches, fisher=fisher, seed=3) for _ in range(2))
    assert torch.equal(evidence(first), evidence(again))
    assert torch.equal(torch.get_rng_state(), state)
    other = fit(case, case.batches, fisher=fisher, seed=4)
    assert torch.equal(evidence(first), evidence(other)) == (fisher == "empirical")


def test_added_data_draw_fresh_labels():
    """The stream of draws goes on where it stopped: two halves are the whole, draw for draw."""
    case = build("mlp-tanh")
    whole = fit(case, case.batches, fisher="mc")
    halves = fit(case, case.batches[:1], fisher="mc").fit(case.batches[1:], override=False)
    torch.testing.assert_close(evidence(halves), evidence(whole), **SAME)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_empirical_fisher_is_the_sum_of_score_outer_products(structure):
    """For regression a peer's is twice as large."""
    case = build("mlp-regression")
    la = fit(case, case.batches, hessian_structure=structure, fisher="empirical")
    expected = oracles.empirical_fisher(case.model, *case.data)
    if structure == "diag":
        expected = expected.diagonal().diag()
    torch.testing.assert_close(dense.hessian(la, case.model), expected, rtol=1e-10, atol=1e-10)
