"""Runs in between: memory that runs out in them is said, and they leave no trace in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Curvature


class Net(nn.Module):
    """Linear, a step between, linear. The step sees the module, inputs and features (n, 6)."""

    def __init__(self, step: Callable[[Net, Tensor, Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 6), nn.Linear(6, 2), step
        self.generator = torch.Generator().manual_seed(3)
        self.calls = 0
        self.register_buffer("running", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.step(self, x, self.first(x).tanh()))


def data(dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3).to(dtype), torch.randint(0, 2, (n,))


def made(step: Callable, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    return Net(step).to(dtype)


MEMORY = (
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "std::bad_alloc",
)


@pytest.mark.parametrize("words", MEMORY)
def test_memory_that_runs_out_in_the_check_is_raised_at_once(words):
    def exhausted(net: Net, x: Tensor, h: Tensor) -> Tensor:
        if net.calls > 1:
            raise RuntimeError(words)
        return h

    model = made(exhausted)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(0))
    with pytest.raises(RuntimeError, match="alloc|memory|ALLOC"):
        Curvature(model, "classification").fit([data()])
    assert len(seen) == 2


def average(net: Net, x: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        net.running.mul_(0.5).add_(h.mean(0))
    return h


def add_one(net: Net, x: Tensor, h: Tensor) -> Tensor:
    net.count.add_(1)
    return h


def largest(net: Net, x: Tensor, h: Tensor) -> Tensor:
    torch.maximum(net.running, h.detach().amax(0), out=net.running)
    return h


def in_numpy(net: Net, x: Tensor, h: Tensor) -> Tensor:
    net.array += 1
    net.nested["array"][0] += 1
    return h


def histories(net: Net, x: Tensor, h: Tensor) -> Tensor:
    net.history.append(len(h))
    net.nested["history"].append(len(h))
    return h


def loose(net: Net, x: Tensor, h: Tensor) -> Tensor:
    net.loose += 1
    net.nested["loose"] += 1
    return h


def grows(net: Net, x: Tensor, h: Tensor) -> Tensor:
    net.seen = torch.cat([net.seen, torch.tensor([len(h)])])
    return h


def scratch(net: Net, x: Tensor, h: Tensor) -> Tensor:
    """Written to and saved by the graph: as after the recorded pass, or its gradients are wrong."""
    with torch.no_grad():
        net.scratch[: len(h)] = x.sum(1, keepdim=True)
    return h * net.scratch[: len(h)]


STATEFUL = {
    "average": average,
    "count": add_one,
    "largest": largest,
    "numpy": in_numpy,
    "lists": histories,
    "tensors": loose,
    "another tensor": grows,
}


class Stateful(Net):
    """With places for whatever a step counts; outputs of many positions have few gradients."""

    def __init__(self, step: Callable, shared: bool):
        super().__init__(step)
        self.shared, self.array, self.history = shared, np.zeros(2), []
        self.loose, self.seen = torch.zeros(()), torch.zeros(0, dtype=torch.long)
        self.nested = {"array": np.zeros(1), "history": [], "loose": torch.zeros(())}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.shared:
            return super().forward(x)
        h = F.relu(self.first(x[:, None].repeat(1, 3, 1) - torch.arange(3)[:, None]))
        return self.last(self.step(self, x, h.mean(1)))

    def state(self) -> list:
        nested = self.nested
        tensors = [self.count, self.running, self.loose, self.seen, nested["loose"]]
        arrays = [self.array, nested["array"]]
        return [*(t.tolist() for t in [*tensors, *arrays]), self.history, nested["history"]]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_fit_leaves_the_state_of_one_pass_over_the_data(name, structure, shared):
    torch.manual_seed(1)
    model = Stateful(STATEFUL[name], shared).double().eval()
    want = copy.deepcopy(model)
    x, y = data(n=40)
    with torch.no_grad():
        want(x)
        want(x[:7])
    Curvature(model, "classification", hessian_structure=structure).fit([(x, y), (x[:7], y[:7])])
    assert model.state() == want.state()


def test_scratch_memory_is_as_the_recorded_pass_left_it():
    torch.manual_seed(1)
    model, (x, y) = Stateful(scratch, shared=False).double(), data()
    plain = copy.deepcopy(model)
    plain.step = lambda net, x, h: h * x.sum(1, keepdim=True)
    got, want = (
        Curvature(net, "classification", hessian_structure="full").fit([(x, y)]).blocks["full"]
        for net in (model, plain)
    )
    assert torch.allclose(got.dense(), want.dense(), rtol=1e-12, atol=0)
