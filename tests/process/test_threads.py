"""Threads that use the library at once find what they would find one after the other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from laws import Untouched
from process.lives import LIVES, MODELS, batches, made, same
from process.threads import LONG, Process, at_once
from torch import Tensor, nn

from kfac_laplace import Laplace
from kfac_laplace.optim import KFAC, Estimate
from kfac_laplace.subnetworks import ModuleNameSubnetMask


def several(life: str, name: str, *options: Any, seeds: int) -> None:
    """Lives of different seeds at once are those one after the other."""

    def lives() -> list[Callable[[], list[Tensor]]]:
        return [partial(LIVES[life], *made(name, seed), seed, *options) for seed in range(seeds)]

    want, runs = [run() for run in lives()], lives()
    process = Process()
    for got, expected in zip(at_once(*runs), want, strict=True):
        assert same(got, expected)
    process.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("life", LIVES)
def test_threads_with_objects_of_their_own(life, name):
    several(life, name, seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag", "full", "lowrank"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("life", LIVES)
def test_many_threads_with_objects_of_their_own(life, name, structure):
    several(life, name, structure, seeds=4)


class Meeting(nn.Module):
    """A linear layer; its n-th call in evaluation mode waits for what `meet` does."""

    def __init__(self, call: int, meet: Callable[[], Any]):
        super().__init__()
        self.linear, self.calls, self.call, self.meet = nn.Linear(3, 3).double(), 0, call, meet

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.calls += 1
            if self.calls == self.call:
                self.meet()
        return self.linear(x)


def rows() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, generator=draws, dtype=torch.float64)
    return [(x, torch.tensor([0, 1, 2, 0]))]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_the_first_to_begin_may_be_the_first_to_end(call):
    """Each of two fits leaves all that a process has as it was before both."""
    began, inside, ended = (threading.Event() for _ in range(3))
    # Runs under seeds of their own are one thread's at a time: there both waits run out.
    seconds = LONG if call == 1 else 0.5
    first = Meeting(call, lambda: (began.set(), inside.wait(seconds)))
    second = Meeting(1, lambda: (inside.set(), ended.wait(seconds)))
    process = Process()

    def one() -> None:
        Laplace(first, "classification").fit(rows())
        ended.set()

    def other() -> None:
        assert began.wait(LONG)
        Laplace(second, "classification").fit(rows())

    at_once(one, other)
    process.check()


@pytest.mark.parametrize("name", MODELS)
def test_two_threads_predict_with_one_posterior(name):
    model, data = made(name, 0)
    x = data.tensors[0]
    la = Laplace(model, "classification").fit(batches(data))
    ways: list[Callable[[], Tensor]] = [
        lambda: la(x),
        lambda: la(x[:3], link_approx="mc"),
        lambda: la(x[:3], pred_type="nn", n_samples=4),
        lambda: la.functional_samples(x[:3], 2, generator=torch.Generator().manual_seed(1)),
        lambda: la.predict_loader(batches(data)).mean,
    ]
    want = [way() for way in ways]
    untouched, process = Untouched(model), Process()
    for got in at_once(*[lambda: [way() for way in ways]] * 3):
        assert same(got, want)
    untouched.check()
    process.check()


def test_a_model_may_be_fitted_while_it_predicts():
    """Fitting sees the model's own parameters, not those that predictions put in their place."""
    model, data = made("vit", 0)
    la = Laplace(model, "classification").fit(batches(data))
    x, untouched = data.tensors[0][:4], Untouched(model)
    want = la(x)

    def fit() -> list[Tensor]:
        one = Laplace(model, "classification").fit(batches(data))
        return [one.log_marginal_likelihood().detach(), one(x)]

    alone = fit()
    fitted, predicted, coverage = at_once(
        fit,
        lambda: [la(x, pred_type="nn", n_samples=3) is not None and la(x) for _ in range(6)],
        lambda: [la.coverage == la.curvature.coverage and str(la.summary()) for _ in range(6)],
    )
    assert same(fitted, alone) and same(predicted, [want] * 6) and len(set(coverage)) == 1
    untouched.check()


def test_estimators_train_by_their_seeds_in_threads():
    """Training draws from the global generators, and so is one thread's at a time."""
    pytest.importorskip("sklearn")
    from kfac_laplace.integrations.sklearn import LaplaceClassifier

    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).numpy()

    def train(seed: int) -> Tensor:
        estimator = LaplaceClassifier(hidden_layer_sizes=(4,), epochs=3, random_state=seed)
        return torch.as_tensor(estimator.fit(x, x[:, 0] > 0).predict_proba(x))

    calls = [partial(train, seed) for seed in range(3)]
    want, process = [call() for call in calls], Process()
    assert same(at_once(*calls), want)
    process.check(but="filters of warnings")  # scikit-learn's checks of tables leave them changed


def test_masks_of_a_model_are_made_between_its_passes():
    """Of its own parameters, not of the tensors that a pass puts in their place."""
    began, chosen = threading.Event(), threading.Event()
    # The mask waits for its turn, so that the wait inside the pass runs out.
    model = Meeting(0, lambda: (began.set(), chosen.wait(1)))
    la = Laplace(model, "classification").fit(rows())
    want = ModuleNameSubnetMask(model, ["linear"]).select()
    model.call = model.calls + 1

    def predict() -> None:
        la(rows()[0][0], pred_type="nn", n_samples=2)

    def choose() -> Tensor:
        assert began.wait(LONG)
        found = ModuleNameSubnetMask(model, ["linear"]).select()
        chosen.set()
        return found

    _, got = at_once(predict, choose)
    assert torch.equal(got, want)


def test_models_may_share_a_module():
    torch.manual_seed(0)
    stem = nn.Linear(4, 4)
    models = [nn.Sequential(stem, nn.Tanh(), nn.Linear(4, 3)).double() for _ in range(2)]
    _, data = made("mlp", 0)
    x = data.tensors[0]
    posteriors = [Laplace(model, "classification").fit(batches(data)) for model in models]
    want = [la(x) for la in posteriors]
    untouched = Untouched(models[0])
    calls = [lambda la=la: [la(x) for _ in range(6)] for la in posteriors]
    for got, expected in zip(at_once(*calls), want, strict=True):
        assert same(got, [expected] * 6)
    untouched.check()


def test_passes_of_different_models_overlap():
    """Turns are of models, not of the library: these two fits end only if they meet."""
    both = threading.Barrier(2, timeout=LONG)
    models = [Meeting(1, both.wait) for _ in range(2)]
    at_once(*[lambda model=model: Laplace(model, "classification").fit(rows()) for model in models])


def test_an_error_ends_a_turn():
    def fail() -> None:
        raise ZeroDivisionError

    model = Meeting(1, fail)
    with pytest.raises(ZeroDivisionError):
        Laplace(model, "classification").fit(rows())
    (la,) = at_once(lambda: Laplace(model, "classification").fit(rows()))
    assert la.n_data == 4


@pytest.mark.parametrize("mode", ["autocast", "inference", "no_grad"])
def test_modes_of_one_thread_are_not_those_of_another(mode):
    """A copy of the model serves in another thread, in its modes, while this one is fitted."""
    model, data = made("cnn", 0)
    served, x = copy.deepcopy(model).eval(), data.tensors[0]
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
    }

    def serve() -> list[Tensor]:
        with contexts[mode]():
            return [served(x).float() for _ in range(30)]

    def fit() -> list[Tensor]:
        la = Laplace(model, "classification").fit(batches(data))
        return [la.log_marginal_likelihood().detach(), la(x)]

    want, alone = serve(), fit()
    outputs, fitted = at_once(serve, fit)
    assert same(outputs, want) and same(fitted, alone)
    assert mode == "autocast" or not any(output.requires_grad for output in outputs)


def test_the_model_itself_may_run_in_another_thread_if_it_has_no_modes():
    """It sees parameters of the same values; what a fit records is its own passes alone."""
    model, data = made("vit", 0)
    x = data.tensors[0]

    def serve() -> list[Tensor]:
        with torch.no_grad():
            return [model(x) for _ in range(30)]

    def fit() -> list[Tensor]:
        la = Laplace(model, "classification", hessian_structure="full").fit(batches(data))
        return [la.log_marginal_likelihood().detach()]

    want, alone = serve(), fit()
    outputs, fitted = at_once(serve, fit)
    assert same(fitted, alone)
    for got, expected in zip(outputs, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_kfac_does_not_mind_the_model_being_used_in_another_thread():
    """A call in the midst of a recorded pass neither ends nor joins it."""
    called = threading.Event()

    class Paused(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            if wait and self.training and threading.current_thread() is trainer:
                inside.set()
                assert called.wait(LONG)
            return self[1](h.tanh())

    trainer, results = threading.current_thread(), []
    for wait in (False, True):
        inside = threading.Event()
        torch.manual_seed(0)
        model = Paused(nn.Linear(3, 4), nn.Linear(4, 3)).double()
        optimizer = KFAC(model, curvature=Estimate(every=1, bases_every=1))
        (batch,) = rows()

        def look(inside: threading.Event = inside, model: nn.Module = model) -> None:
            assert inside.wait(LONG)
            with torch.no_grad():
                model(rows()[0][0])
            called.set()

        thread = threading.Thread(target=look, daemon=True)
        if wait:
            thread.start()
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        if wait:
            thread.join(LONG)
        assert not torch.overrides._get_current_function_mode_stack()
        results.append([p.detach().clone() for p in model.parameters()])
    assert same(*results)
