"""EKFAC: the exact diagonal in K-FAC's eigenbasis, with the theorems that make it the nearest."""

from __future__ import annotations

import pickle

import oracles
import pytest
import torch
from cases import build
from laws import EXACT, fitted, relative_error
from torch import nn

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.curvature.estimate.eigen_block import EigenBlock
from kfac_laplace.errors import InvalidValue

CASES = ["mlp-tanh", "mlp-regression", "cnn", "vit", "tokens", "twice", "conv-2d-groups"]


def pairs(name, **options):
    """EKFAC's and K-FAC's blocks of a case by group, and the dense GGN of each."""
    case = build(name)
    ekfac = fitted(case, hessian_structure="ekfac", **options)
    kfac = fitted(case, **options)
    for group, block in ekfac.blocks.items():
        if isinstance(block, EigenBlock):
            yield block, kfac.blocks[group], oracles.ggn(case.model, *case.data, list(block.params))


def in_basis(block, dense):
    """Uᵀ H U of a dense block, in the order of the block's matrices."""
    left, right = block.bases()
    basis = torch.block_diag(*[torch.kron(u, w) for u, w in zip(left, right, strict=True)])
    order = block.layout.order
    matrix = torch.empty_like(dense)
    matrix[order[:, None], order] = dense
    return basis.mT @ matrix @ basis


@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_exact_in_the_eigenbasis_of_the_factors(name):
    """George et al. 2018, eq. 10: E[(Uᵀ g)²], here a sum over examples and roots of Λ."""
    for block, kfac, dense in pairs(name):
        diagonal = in_basis(block, dense).diagonal().reshape(block.layout.matrix)
        assert relative_error(block.values, diagonal) <= EXACT
        left, right = block.bases()
        for basis, factor in ((left, kfac.factors.output), (right, kfac.factors.input)):
            turned = basis.mT @ factor @ basis
            rest = turned - turned.diagonal(dim1=1, dim2=2).diag_embed()
            assert float(rest.abs().max()) <= EXACT * float(factor.norm())


@pytest.mark.parametrize("name", CASES)
def test_no_diagonal_in_that_basis_is_nearer(name):
    """K-FAC's products are another one; the trace is the GGN's own."""
    for block, kfac, dense in pairs(name):
        error, other = ((b.dense() - dense).norm() for b in (block, kfac))
        assert float(error) <= float(other) + EXACT * float(dense.norm())
        torch.testing.assert_close(block.dense().trace(), dense.trace())


@pytest.mark.parametrize("delta", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_its_log_determinant_bounds_that_of_the_exact_block(name, delta):
    """Hadamard: log det diag(Uᵀ P U) ≥ log det P, so that evidence by blocks is bounded below."""
    for block, _, dense in pairs(name):
        prior = torch.full((len(dense),), delta, dtype=torch.float64)
        ours = float(oracles.log_det_ratio(block.dense(), 1.0, prior))
        exact = float(oracles.log_det_ratio(dense, 1.0, prior))
        assert ours >= exact - 1e-9 * abs(exact)
        value = block.spectrum.log_det_ratio(torch.ones(()), prior[0]).item()
        assert value == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("name", ["mlp-tanh", "cnn", "vit", "tokens"])
def test_its_evidence_is_below_that_of_the_exact_curvature(name):
    """By Hadamard in each block, and by Fischer over the blocks; K-FAC's is on neither side."""
    case = build(name)
    la = Laplace(case.model, case.likelihood, hessian_structure="ekfac").fit(case.batches)
    for delta in (0.01, 1.0, 20.0):
        la.prior_precision = delta
        exact = float(la.evidence("exact").value)
        assert float(la.log_marginal_likelihood()) <= exact + 1e-9 * abs(exact)


@pytest.mark.parametrize("name", ["deep-linear", "deep-linear-reduce"])
def test_where_kfac_is_exact_so_is_it(name):
    for block, kfac, dense in pairs(name):
        assert relative_error(block.dense(), dense) <= EXACT
        assert relative_error(block.dense(), kfac.dense()) <= EXACT


def test_the_empirical_fisher_in_its_own_basis():
    case = build("mlp-tanh")
    curvature = fitted(case, hessian_structure="ekfac", fisher="empirical")
    for block in curvature.blocks.values():
        scores = oracles.empirical_fisher(case.model, *case.data, list(block.params))
        diagonal = in_basis(block, scores).diagonal().reshape(block.layout.matrix)
        assert relative_error(block.values, diagonal) <= EXACT


def embedding():
    """Labels of sequences of words: a table, whose A is diagonal, and a head."""
    table, head = nn.Embedding(6, 3), nn.Linear(3, 2)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = table, head

        def forward(self, words):
            return self.head(self.table(words).tanh().mean(1))

    return Tagger().double(), torch.randint(5, (9, 4)), torch.randint(2, (9,))


def test_tables_have_a_diagonal_side():
    model, x, y = embedding()
    la = Laplace(model, "classification", hessian_structure="ekfac").fit(
        [(x[:5], y[:5]), (x[5:], y[5:])]
    )
    block = la.curvature.blocks["table.weight"]
    assert block.bases()[1] is None and la.coverage["table.weight"] == "ekfac"
    dense = oracles.ggn(model, x, y, "classification", ["table.weight"])
    left = block.output_basis[0]
    turned = torch.einsum("ap,iajb,bq->ipjq", left, dense.reshape(6, 3, 6, 3), left)
    values = turned.flatten(2).flatten(0, 1).diagonal().reshape(6, 3).mT
    torch.testing.assert_close(block.values[0], values)
    torch.testing.assert_close(block.dense().trace(), dense.trace())


@pytest.mark.parametrize("name", ["mlp-tanh", "mlp-regression", "cnn", "vit"])
def test_predictions_and_evidence_are_those_of_the_dense_blocks(name):
    case = build(name)
    la = Laplace(case.model, case.likelihood, hessian_structure="ekfac", prior_structure="scalar",
                 prior_precision=0.7).fit(case.batches)  # fmt: skip
    names = [n for n, _ in case.model.named_parameters()]
    sizes = {n: p.numel() for n, p in case.model.named_parameters()}
    starts = dict(zip(names, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    dense = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for block in la.curvature.blocks.values():
        where = torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in block.params])
        dense[where[:, None], where] = block.dense()
    delta = torch.full((len(dense),), 0.7, dtype=torch.float64)
    torch.testing.assert_close(la.log_det_ratio, oracles.log_det_ratio(dense, 1.0, delta))
    jacobian = oracles.jacobian(case.model, *case.data, names)
    want = oracles.glm_covariance(jacobian, dense, 1.0, delta)
    torch.testing.assert_close(la.predict(case.x).covariance.reshape(want.shape), want)


def test_batches_add_in_one_basis():
    """Split, added to and merged, diagonals are sums; those in other bases do not add."""
    case = build("cnn")
    whole = fitted(case, hessian_structure="ekfac")
    twice = whole.copy().fit([(case.x, case.y)])
    part = whole.empty().fit([(case.x, case.y)])
    merged = whole.copy().merge(part)
    for name, block in whole.blocks.items():
        for other in (
            part.blocks[name],
            twice.blocks[name].scaled(0.5),
            merged.blocks[name].scaled(0.5),
        ):
            assert relative_error(other.dense(), block.dense()) <= EXACT
    other = fitted(case, case.batches[:1], hessian_structure="ekfac")
    with pytest.raises(InvalidValue, match=r"different eigenbases.*curvature\.empty\(\)"):
        other.merge(whole)
    assert other.n_data == 3


def test_one_batch_at_a_time_takes_the_basis_of_the_first():
    case = build("mlp-tanh")
    curvature = Curvature(case.model, case.likelihood, hessian_structure="ekfac")
    for batch in case.batches:
        curvature.accumulate(*batch)
    first = fitted(case, case.batches[:1])
    bases = first.ggn.eigenbases()
    for name, block in curvature.blocks.items():
        assert torch.equal(block.output_basis, bases[name][0])
        dense = oracles.ggn(case.model, *case.data, list(block.params))
        diagonal = in_basis(block, dense).diagonal().reshape(block.layout.matrix)
        assert relative_error(block.values, diagonal) <= EXACT


def test_saved_and_loaded_it_is_the_same(tmp_path):
    case = build("vit")
    la = Laplace(case.model, case.likelihood, hessian_structure="ekfac").fit(case.batches)
    la.save(tmp_path / "la.pt")
    loaded = Laplace.load(tmp_path / "la.pt", case.model)
    copied = pickle.loads(pickle.dumps(la))
    assert torch.equal(copied.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(loaded.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(loaded(case.x), la(case.x))
    more = [
        each.fit(case.batches, override=False).log_marginal_likelihood() for each in (loaded, la)
    ]
    assert torch.equal(*more)


def test_unused_parameters_are_stored_without_curvature(tmp_path):
    model = build("mlp-tanh").model
    model.add_module("spare", nn.Linear(2, 2).double())
    model.forward = lambda x: model[2](model[1](model[0](x)))
    case = build("mlp-tanh")
    la = Laplace(model, "classification", hessian_structure="ekfac").fit(case.batches)
    la.save(tmp_path / "la.pt")
    assert Laplace.load(tmp_path / "la.pt", model).coverage["spare.weight"] == "unused"


def test_data_that_are_read_once_are_refused():
    case = build("mlp-tanh")
    la = Laplace(case.model, case.likelihood, hessian_structure="ekfac")
    with pytest.raises(InvalidValue, match="reads the data twice.*iterator"):
        la.fit(iter(case.batches))
    assert not la.curvature.blocks


@pytest.mark.parametrize("sharing", ["unit", "diag"])
def test_priors_within_a_layer_are_refused(sharing):
    with pytest.raises(InvalidValue, match="does not commute.*ekfac"):
        Laplace(build("mlp-tanh").model, hessian_structure="ekfac", prior_structure=sharing)


def test_a_tuner_makes_its_rounds_with_it():
    case = build("mlp-tanh")
    tuner = MarglikTuner(case.model, "classification", 7, hessian_structure="ekfac",
                         n_epochs_burnin=1)  # fmt: skip
    for _ in range(3):
        for x, y in case.batches:
            tuner.loss(case.model(x), y)
        tuner.step(case.batches)
    la = tuner.laplace(case.batches)
    assert la.coverage["0.weight"] == "ekfac" and tuner.history
