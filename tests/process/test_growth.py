"""Rounds of everything leave no tensors, and nothing of ours keeps what the caller dropped."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from process.lives import batches, made
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.optim import KFAC, Estimate

Round = Callable[[], Any]


def live(but: Iterable[Any] = ()) -> tuple[int, int]:
    """Number of tensors that Python knows, and the bytes of their storages; without some."""
    gc.collect()
    others = {id(one) for one in but}
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    tensors = [one for one in found if id(one) not in others]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided
    }
    return len(tensors), sum(storages.values())


def _fit(model: nn.Module, data: TensorDataset) -> Round:
    return lambda: Laplace(model, "classification").fit(batches(data))


def _refit(model: nn.Module, data: TensorDataset) -> Round:
    la = Laplace(model, "classification")
    return lambda: la.fit(batches(data))


def _optimise(model: nn.Module, data: TensorDataset) -> Round:
    la, loader = Laplace(model, "classification"), batches(data)
    la.fit(loader)

    def run() -> None:
        la.prior_precision = 1.0
        la.optimize_prior().optimize_prior("mackay").calibrate(loader)

    return run


def _evidence(model: nn.Module, data: TensorDataset) -> Round:
    """Evidence with its graph, by each objective."""
    la = Laplace(model, "classification").fit(batches(data))

    def run() -> None:
        delta = torch.ones(len(la.curvature.blocks), dtype=torch.float64, requires_grad=True)
        la.log_marginal_likelihood(prior_precision=delta).backward()
        la.evidence(objective="exact")

    return run


def _predict(model: nn.Module, data: TensorDataset) -> Round:
    la, x = Laplace(model, "classification").fit(batches(data)), data.tensors[0]

    def run() -> None:
        la(x), la(x, link_approx="mc"), la(x, pred_type="nn", n_samples=2)
        la.functional_samples(x, 2)
        if x.is_floating_point():
            la.predict(x.clone().requires_grad_(), enable_backprop=True).mean.sum().backward()

    return run


def _merge(model: nn.Module, data: TensorDataset) -> Round:
    """Data taken in, again and again."""
    curvature, loader = Curvature(model, "classification"), batches(data)
    curvature.fit(loader)
    return lambda: curvature.merge(Curvature(model, "classification").fit(loader))


def _save(model: nn.Module, data: TensorDataset) -> Round:
    la = Laplace(model, "classification").fit(batches(data))

    def run() -> None:
        other = Laplace(model, "classification")
        other.load_state_dict(la.state_dict())
        other(data.tensors[0])

    return run


def _tune(model: nn.Module, data: TensorDataset) -> Round:
    """A step of training and a round of the tuner, which keeps a record of each: no growth else."""
    tuner = MarglikTuner(model, "classification", 13, n_epochs_burnin=0)
    optimizer, loader = torch.optim.Adam(model.parameters(), lr=1e-3), batches(data)

    def run() -> None:
        for x, y in loader:
            optimizer.zero_grad()
            tuner.loss(model(x), y).backward()
            optimizer.step()
        tuner.step(loader)

    return run


def _kfac(model: nn.Module, data: TensorDataset) -> Round:
    optimizer = KFAC(model, lr=1e-3, curvature=Estimate(every=1, bases_every=2))
    x, y = data.tensors

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def _fail(model: nn.Module, data: TensorDataset) -> Round:
    """A batch that is refused leaves nothing of itself."""
    la, (x, y) = Laplace(model, "classification"), data.tensors

    def run() -> None:
        with pytest.raises(ValueError):
            la.fit([(x, y), (x, y + 7)])

    return run


ROUNDS = {
    "fit": _fit,
    "refit": _refit,
    "optimise": _optimise,
    "evidence": _evidence,
    "predict": _predict,
    "merge": _merge,
    "states": _save,
    "tune": _tune,
    "kfac": _kfac,
    "refused": _fail,
}
#: Rounds after which caches are full; and for how many more counts have to stand still.
WARM, FEW, MANY = 2, 4, 200


def in_records(run: Round) -> list[Any]:
    """Tensors that the records of a tuner hold."""
    tuners = [c.cell_contents for c in run.__closure__ or () if hasattr(c.cell_contents, "history")]
    records = [vars(record) for tuner in tuners for record in tuner.history]
    return [value for record in records for value in tree_leaves(record)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ROUNDS)
def test_rounds_leave_no_tensors(kind, n):
    """What one of two rounds in turn keeps, a merged sum for one, may differ from the other's."""
    run = ROUNDS[kind](*made("tokens", 0))
    for _ in range(WARM):
        run()
    counts = []
    for k in range(n):
        run()
        if k < 2 or k >= n - 2 or k % 50 == 0:
            counts.append(live(in_records(run)))
    largest = [max(pair) for pair in zip(*counts[:2], strict=True)]
    for count in counts:
        assert count[0] <= largest[0] and count[1] <= largest[1], counts


class Loader(list):
    """A list of batches to which a weak reference may point."""


def _used(model: nn.Module, loader: Loader, kept: list[Any]) -> None:
    """Everything that is done with a model, by objects that go at the end."""
    la = Laplace(model, "classification").fit(loader)
    la.optimize_prior().calibrate(loader)
    la(loader[0][0])
    la.evidence(objective="exact")
    kept.append(la(loader[0][0]))
    kept.append(la.log_marginal_likelihood().detach())
    kept.append(la.state_dict())
    kept.append(la.summary())


def _trained(model: nn.Module, loader: Loader, kept: list[Any]) -> None:
    optimizer = KFAC(model, curvature=Estimate(every=1, bases_every=1))
    tuner = MarglikTuner(model, "classification", 13)
    for x, y in loader:
        optimizer.zero_grad()
        tuner.loss(model(x), y).backward()
        optimizer.step()
    kept.append(tuner.step(loader))
    kept.append([*tuner.history])
    kept.append(tuner.state_dict())
    kept.append(optimizer.state_dict())
    optimizer.close()


def _refused(model: nn.Module, loader: Loader, kept: list[Any]) -> None:
    x, y = loader[0]
    with pytest.raises(ValueError) as error:
        Laplace(model, "classification").fit([*loader, (x, y + 7)])
    kept.append(str(error.value))


@pytest.mark.parametrize("use", [_used, _trained, _refused])
@pytest.mark.parametrize("name", ["mlp", "cnn", "vit", "tokens"])
def test_what_the_caller_drops_is_gone(name, use):
    """Results and states are kept here; model, loader and batches are not kept by them."""
    model, data = made(name, 0)
    loader, kept = Loader(batches(data)), []
    use(model, loader, kept)
    watched = [weakref.ref(one) for one in (model, loader, loader[0][0], *model.parameters())]
    del model, data, loader
    gc.collect()
    assert kept and not any(ref() is not None for ref in watched)


def test_a_posterior_that_reads_on_keeps_its_data_alone():
    """`fit` keeps its loaders, for what asks for data once more; a new fit drops them."""
    model, data = made("mlp", 0)
    first, second = Loader(batches(data)), Loader(batches(data))
    la = Laplace(model, "classification").fit(first)
    ref = weakref.ref(first)
    del first
    gc.collect()
    assert ref() is not None
    la.fit(second)
    gc.collect()
    assert ref() is None


def test_a_model_dies_without_the_collector_after_a_fit():
    """No cycle of ours runs through it."""
    model, data = made("mlp", 0)
    gc.collect()
    gc.disable()
    try:
        la = Laplace(model, "classification").fit(batches(data))
        la(data.tensors[0])
        ref = weakref.ref(model)
        del model, la
        assert ref() is None
    finally:
        gc.enable()
