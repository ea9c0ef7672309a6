"""A backward pass hands on the rows of every recorded call once: those of `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from kfac_laplace.curvature.recording.backward import Backward
from kfac_laplace.curvature.recording.tape import Recording, Tape

N, WIDTH = 3, 4
# The engine adds a node's gradients in another order when it gives others of them back.
EXACT = 1e-14


class Layers(nn.Module):
    """Four linear layers, put together by a function."""

    def __init__(self, wire: Callable[[Layers, Tensor], Tensor]):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)
        self._wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self._wire(self, x)


def chain(m: Layers, x: Tensor) -> Tensor:
    return m.head(m.c(m.b(m.a(x).tanh()).tanh()).tanh()).tanh()


def ends_in_a_layer(m: Layers, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x).tanh()))


def residual(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    h = h + m.b(h.tanh()) + m.c(h.sin())
    return m.head(h.tanh()).tanh()


def side_by_side(m: Layers, x: Tensor) -> Tensor:
    """No layer but the first is above another."""
    h = m.a(x).tanh()
    return m.b(h).tanh().sum(-1, keepdim=True) + m.c(h).sin() + m.head(h).exp().sum(-1, True)


def apart(m: Layers, x: Tensor) -> Tensor:
    """No layer is above another."""
    return m.a(x).tanh() * m.b(x.sin()) + m.c(x).exp()


def straight_after_one_another(m: Layers, x: Tensor) -> Tensor:
    """Outputs of calls are the inputs of the next, and enter the sum as well."""
    first = m.a(x)
    second = m.b(first)
    return first + second + m.c(second)


def tied(m: Layers, x: Tensor) -> Tensor:
    h = m.a(m.b(m.a(x).tanh()).tanh())
    return m.head(h + m.a(h).tanh()).tanh()


def overwritten(m: Layers, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(x).tanh()
    return m.head(h.relu_()).tanh()


def checkpointed(m: Layers, x: Tensor) -> Tensor:
    h = checkpoint(lambda h: m.b(m.a(h).tanh()), x, use_reentrant=False)
    return m.head(checkpoint(lambda h: m.c(h.tanh()).sin(), h, use_reentrant=False)).tanh()


def unbound(m: Layers, x: Tensor) -> Tensor:
    """A root that is one of several outputs of its node, a use above such nodes."""
    one, other = m.a(x).unbind(-1)[:2]
    return m.head(torch.stack([one, other.tanh()] * 2, -1)).unbind(-1)[1]


WIRINGS = (
    chain,
    ends_in_a_layer,
    residual,
    side_by_side,
    apart,
    straight_after_one_another,
    tied,
    overwritten,
    checkpointed,
    unbound,
)
wirings = pytest.mark.parametrize("wire", WIRINGS, ids=lambda wire: wire.__name__)


def recorded(wire: Callable[[Layers, Tensor], Tensor]) -> Recording:
    model, x = Layers(wire).double(), torch.randn(N, WIDTH, dtype=torch.float64)
    with Tape(dict(model.named_parameters()), [x], N) as tape:
        return tape.recording(model(x))


def rows_of(recording: Recording, root: Tensor | GradientEdge, vector: Tensor) -> dict[int, Tensor]:
    """Gradient rows of each use, one `autograd.grad` for each, where root depends on it."""
    found = {}
    for u, use in enumerate(recording.uses):
        (grad,) = torch.autograd.grad(root, [use.edge], vector, True, allow_unused=True)
        if grad is not None:
            found[u] = use.layer.output_rows(grad[None])
    return found


class Collected(dict):
    """Rows by use; a use that comes twice is an error."""

    def __call__(self, u: int, rows: Tensor) -> None:
        assert u not in self, f"use {u} was handed on twice"
        assert not rows.requires_grad
        self[u] = rows.clone()


def assert_same(got: dict[int, Tensor], want: dict[int, Tensor]) -> None:
    assert got.keys() == want.keys()
    for u, rows in want.items():
        torch.testing.assert_close(got[u], rows, rtol=EXACT, atol=EXACT)


@wirings
def test_all_uses_get_the_rows_of_their_edges(wire):
    recording = recorded(wire)
    uses = range(len(recording.uses))
    backward = Backward(recording, recording.output, uses)
    for _ in range(2):  # the graph is kept for a second vector
        vector = torch.randn_like(recording.output)
        got = Collected()
        backward(vector, got)
        assert_same(got, rows_of(recording, recording.output, vector))
        assert len(got) == len(uses) >= 3 - (wire is unbound)


@wirings
def test_any_choice_of_uses_gets_the_same_rows(wire):
    recording = recorded(wire)
    vector = torch.randn_like(recording.output)
    want = rows_of(recording, recording.output, vector)
    for mask in range(2 ** len(recording.uses)):
        uses = [u for u in want if mask >> u & 1]
        got = Collected()
        Backward(recording, recording.output, uses)(vector, got)
        assert_same(got, {u: want[u] for u in uses})


@wirings
def test_every_edge_may_be_the_root(wire):
    """Uses below the edge and the edge's own call are handed on, the others are left out."""
    recording = recorded(wire)
    for own, use in enumerate(recording.uses):
        vector = torch.randn(N, use.layer.matrix[1], dtype=torch.float64)
        got = Collected()
        Backward(recording, use.edge, range(len(recording.uses)))(vector, got)
        assert_same(got, rows_of(recording, use.edge, vector))
        assert torch.equal(got[own][0, 0], vector)


def test_a_root_within_the_graph_reaches_what_is_below_it():
    recording = recorded(chain)
    below, index = recording.uses[-1].edge.node.next_functions[1]  # the head's input
    vector = torch.randn(N, WIDTH, dtype=torch.float64)
    got = Collected()
    Backward(recording, GradientEdge(below, index), range(4))(vector, got)
    assert sorted(got) == [0, 1, 2]
    assert_same(got, rows_of(recording, GradientEdge(below, index), vector))


@pytest.mark.parametrize("root", [torch.ones(N, 2), torch.ones(N, 2, requires_grad=True)])
def test_a_root_outside_the_graph_reaches_nothing(root):
    recording = recorded(chain)
    got = Collected()
    Backward(recording, root, range(4))(torch.ones(N, 2), got)
    assert not got


def test_no_use_wanted_is_no_backward_pass():
    recording = recorded(chain)
    Backward(recording, recording.output, [])(torch.ones_like(recording.output), pytest.fail)


class Refused(Exception):
    """Not one of the library's errors."""


@wirings
def test_an_exception_arrives_as_it_was_raised_and_leaves_no_hooks(wire):
    recording = recorded(wire)
    backward = Backward(recording, recording.output, range(len(recording.uses)))
    vector = torch.randn_like(recording.output)
    for fatal in range(len(recording.uses)):
        error = Refused(fatal)
        calls = []

        def receive(u: int, rows: Tensor, fatal=fatal, error=error, calls=calls) -> None:
            calls.append(u)
            if u == fatal:
                raise error

        with pytest.raises(Refused) as caught:
            backward(vector, receive)
        assert caught.value is error
        seen = len(calls)
        want = rows_of(recording, recording.output, vector)  # runs through the same nodes
        assert len(calls) == seen, "a hook is still there"
    got = Collected()
    backward(vector, got)
    assert_same(got, want)


@wirings
def test_no_hook_is_left(wire):
    recording = recorded(wire)
    calls = []
    backward = Backward(recording, recording.output, range(len(recording.uses)))
    backward(torch.ones_like(recording.output), lambda u, rows: calls.append(u))
    seen = len(calls)
    rows_of(recording, recording.output, torch.ones_like(recording.output))
    assert len(calls) == seen


def test_hooks_of_the_caller_change_both_alike():
    """A gradient that the caller scales is scaled below, and at the edge itself."""

    def scaled(m: Layers, x: Tensor) -> Tensor:
        h = m.a(x)
        h.register_hook(lambda grad: 2 * grad)
        k = m.b(h.tanh())
        k.register_hook(lambda grad: 3 * grad)
        return m.head(k.tanh()).tanh()

    recording = recorded(scaled)
    vector, got = torch.randn_like(recording.output), Collected()
    Backward(recording, recording.output, range(3))(vector, got)
    assert_same(got, rows_of(recording, recording.output, vector))


def test_rows_of_half_precision_come_in_float32():
    model, x = Layers(chain).bfloat16(), torch.randn(N, WIDTH).bfloat16()
    with Tape(dict(model.named_parameters()), [x], N) as tape:
        recording = tape.recording(model(x))
    got = Collected()
    Backward(recording, recording.output, range(4))(torch.ones_like(recording.output), got)
    assert {rows.dtype for rows in got.values()} == {torch.float32} and len(got) == 4


def test_edges_of_outputs_are_as_good_as_outputs():
    recording = recorded(residual)
    vector = torch.randn_like(recording.output)
    one, other = Collected(), Collected()
    Backward(recording, recording.output, range(4))(vector, one)
    Backward(recording, get_gradient_edge(recording.output), range(4))(vector, other)
    assert_same(one, other)
