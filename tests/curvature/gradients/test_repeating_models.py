"""The check of the first batch passes what repeats, at the cost of at most one forward pass."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_laplace import Curvature, Laplace, MarglikTuner
from kfac_laplace.errors import UnsupportedUse

N = 8


class Net(nn.Module):
    """Linear, a step between, linear. The step sees the module, inputs and features (n, 6)."""

    def __init__(self, step: Callable[[Net, Tensor, Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.step = nn.Linear(3, 6), nn.Linear(6, 2), step

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self, x, self.first(x).tanh()))


def data(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(n, 3).to(dtype), torch.randint(0, 2, (n,))


def made(step: Callable, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(1)
    return Net(step).to(dtype)


# --- what has to pass ---------------------------------------------------------------------------


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze()


class Packed(nn.Module):
    """Outputs are as long as the longest sequence of the batch."""

    def __init__(self, enforce_sorted: bool = False):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head, self.enforce_sorted = nn.Linear(4, 2), enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths.cpu(), batch_first=True, enforce_sorted=self.enforce_sorted
        )
        h, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(h)


class Derived(Net):
    """Features are derivatives, for which gradients have to be on."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.first(x).tanh().square().sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.last(F.pad(force, (0, 3)))


def at_least(least: int) -> Callable:
    def step(net: Net, x: Tensor, h: Tensor) -> Tensor:
        if len(h) < least:
            raise ValueError("a batch is needed")
        return h

    return step


class Difference(nn.Module):
    """A small difference of large numbers: what rounding leaves depends on the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 64), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        large = 1e4 * self.last(h)
        return large - (1e4 * F.linear(h.flip(-1), self.last.weight.flip(-1), self.last.bias))


def seeded_noise(net: Net, x: Tensor, h: Tensor) -> Tensor:
    """The same noise each time, by a seed that the model sets itself."""
    torch.manual_seed(0)
    return h + torch.randn(6).double()


LEGITIMATE: dict[str, Callable] = {
    "plain": lambda: made(lambda net, x, h: h),
    "functional dropout in evaluation": lambda: made(
        lambda net, x, h: F.dropout(h, 0.5, net.training)
    ),
    "draws of no consequence": lambda: made(
        lambda net, x, h: (torch.rand(3), random.random(), h)[2]
    ),
    "noise of no size": lambda: made(lambda net, x, h: h + 0.0 * torch.randn_like(h)),
    "frozen noise": lambda: made(
        lambda net, x, h: h + torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    ),
    "noise that is seeded": lambda: made(seeded_noise),
    "no single examples": lambda: made(at_least(2)),
    "whole batches alone": lambda: made(at_least(N)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    ).double(),
    "modules of dropout": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double(),
    "derivatives inside": lambda: Derived(lambda net, x, h: h).double(),
}


@pytest.mark.parametrize("n", [1, 2, 3, N])
@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_repeats_is_fitted(name, n):
    if name == "whole batches alone" and n < N or name == "no single examples" and n < 2:
        pytest.skip("the model does not run on such batches")
    torch.manual_seed(0)
    curvature = Curvature(LEGITIMATE[name](), "classification").fit([data(n=n)])
    assert curvature.n_data == n


@pytest.mark.parametrize("n", [1, 2, N])
def test_a_lost_axis_of_examples_is_found_again(n):
    x, y = data(n=n)
    curvature = Curvature(Squeezed().double(), "regression").fit([(x, y.double())])
    assert curvature.n_data == n


@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_sequences_as_long_as_the_longest(enforce_sorted):
    """Alone they are shorter; the block of all parameters is that of dense algebra."""
    torch.manual_seed(0)
    lengths = torch.tensor([5, 4, 4, 2, 1])
    x, y = torch.randn(5, 5, 3).double(), torch.randint(0, 2, (5, 5))
    y[torch.arange(5) >= lengths[:, None]] = -100
    model = Packed(enforce_sorted).double()
    curvature = Curvature(model, "classification", hessian_structure="full").fit(
        [((x, lengths), y)]
    )
    want = torch.zeros(())
    for row in model(x, lengths)[y >= 0]:
        grads = [torch.autograd.grad(f, [*model.parameters()], retain_graph=True) for f in row]
        jacobian = torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads])
        p = row.detach().softmax(-1)
        want = want + jacobian.mT @ (p.diag() - torch.outer(p, p)) @ jacobian
    (block,) = curvature.blocks.values()
    assert block.params == tuple(name for name, _ in model.named_parameters())
    torch.testing.assert_close(block.dense(), want, rtol=1e-9, atol=1e-12)


def test_padding_that_counts_and_depends_on_copied_parameters_is_refused():
    """Alone an example has no such rows, so that their curvature would be lost."""

    class Shortened(nn.Module):
        def __init__(self):
            super().__init__()
            self.centre, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.head(torch.cdist(x[:, : int(lengths.max())], self.centre))

    torch.manual_seed(0)
    model, lengths = Shortened().double(), torch.tensor([3, 2, 1])
    x, y = torch.randn(3, 3, 3).double(), torch.randint(0, 2, (3, 3))
    with pytest.raises(UnsupportedUse, match="centre: outputs at padded positions.*ignored"):
        Curvature(model, "classification").fit([((x, lengths), y)])
    y[torch.arange(3) >= lengths[:, None]] = -100
    assert Curvature(model, "classification").fit([((x, lengths), y)]).n_data == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "batch norm", "modules of dropout"])
def test_rounding_passes(name, dtype):
    x, y = data(dtype, 64)
    assert Curvature(LEGITIMATE[name]().to(dtype), "classification").fit([(x, y)]).n_data == 64


def test_small_differences_of_large_numbers_pass():
    """Outputs of rounding alone, 1e4 times that of float32, and so all of their size."""
    torch.manual_seed(0)
    model, (x, y) = Difference(), data(torch.float32)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(x[k : k + 1]) for k in range(N)])
    assert float(together.abs().max()) < 1 and not torch.equal(together, alone)
    assert Curvature(model, "regression").fit([(x, together + y[:, None])]).n_data == N


# --- what it costs --------------------------------------------------------------------------------


def rows_of(model: nn.Module, call: Callable[[], object]) -> list[int]:
    """Sizes of the batches that the model ran on."""
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    call()
    handle.remove()
    return sizes


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, N, 33])
def test_at_most_one_forward_pass(n):
    """The recorded pass, half of the batch, one example; later batches are not looked at."""
    model, (x, y) = made(lambda net, x, h: h), data(n=n)
    curvature = Curvature(model, "classification")
    sizes = rows_of(model, lambda: curvature.accumulate(x, y))
    want = [n, 1] if n == 1 else [n, (n + 1) // 2, 1]
    assert sizes == want and sum(sizes) <= 2 * n
    later = rows_of(model, lambda: curvature.accumulate(x, y))
    assert later == ([1, 1] if n == 1 else [n])[:1]


def test_batches_of_one_are_checked_once():
    model, (x, y) = made(lambda net, x, h: h), data()
    curvature = Curvature(model, "classification")
    batches = [*zip(x.split(1), y.split(1), strict=True)]
    assert rows_of(model, lambda: curvature.fit(batches)) == [1] * (N + 1)


def test_once_a_fit_and_once_a_tuner():
    model, batch = made(lambda net, x, h: h), data()
    la = Laplace(model)
    check = [N // 2, 1]
    for _ in range(2):
        assert rows_of(model, lambda: la.fit([batch, batch])) == [N, *check, N]
    assert rows_of(model, lambda: la.fit([batch], override=False)) == [N]
    tuner = MarglikTuner(model, "classification", n_data=N)
    assert rows_of(model, lambda: tuner.step([batch])) == [N, *check]
    assert rows_of(model, lambda: tuner.step([batch])) == [N]
    assert rows_of(model, lambda: tuner.laplace([batch])) == [N]


@pytest.mark.parametrize("name", ["plain", "noise of no size"])
def test_random_states_are_left_as_found(name):
    model, batch = LEGITIMATE[name](), data()
    found = []
    for look in (False, True):
        torch.manual_seed(5)
        np.random.seed(6)
        random.seed(7)
        if look:
            Curvature(model, "classification").fit([batch])
        found.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert found[0] == found[1]


def test_a_refusal_leaves_random_states_as_found():
    model, batch = made(lambda net, x, h: h * float(np.random.uniform(0.5, 1))), data()
    np.random.seed(6)
    model(batch[0])  # the pass itself draws, as it always did
    want = np.random.rand(3)
    np.random.seed(6)
    with pytest.raises(UnsupportedUse):
        Curvature(model, "classification").fit([batch])
    assert np.array_equal(np.random.rand(3), want)
