"""Layouts learned from a batch, whatever the order of its axes and whichever examples it holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import EXACT, assert_same_blocks, dense_blocks, relative_error
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.gradients.knowledge import Knowledge
from kfac_laplace.curvature.gradients.network import Network
from kfac_laplace.curvature.gradients.probing import learn_row_layouts
from kfac_laplace.curvature.rows.row_layout import Axis
from kfac_laplace.errors import InvalidValue, UnsupportedUse
from kfac_laplace.likelihoods import resolve

WIDTH, CLASSES = 4, 3
STRUCTURES = ("reduce", "expand", "diag", "full")
Wire = Callable[["Layers", Tensor], Tensor]


class Layers(nn.Module):
    """Two layers and a head; a function puts them together."""

    def __init__(self, wire: Wire):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._wire(self, x))


def batch_first(m: Layers, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh()).tanh().mean(1)


def sequence_first(m: Layers, x: Tensor) -> Tensor:
    return m.b(m.a(x.transpose(0, 1)).tanh()).tanh().mean(0)


def flattened(m: Layers, x: Tensor) -> Tensor:
    return m.b(m.a(x.flatten(0, 1)).tanh()).tanh().unflatten(0, (len(x), -1)).mean(1)


def flattened_sequence_first(m: Layers, x: Tensor) -> Tensor:
    h = m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh()).tanh()
    return h.unflatten(0, (-1, len(x))).mean(0)


def windows(m: Layers, x: Tensor) -> Tensor:
    """(n w, 2, WIDTH), as windowed attention has it."""
    cut = x.unflatten(1, (-1, 2)).flatten(0, 1)
    h = m.a(cut).tanh()
    h = m.b((h @ cut.mT).softmax(-1) @ h).tanh()
    return h.unflatten(0, (len(x), -1)).mean((1, 2))


def first_one_then_the_other(m: Layers, x: Tensor) -> Tensor:
    return m.b(m.a(x).tanh().transpose(0, 1).contiguous()).tanh().mean(0)


LAYOUTS: dict[Wire, tuple[Axis, Axis]] = {
    batch_first: (Axis(0), Axis(0)),
    sequence_first: (Axis(1), Axis(1)),
    flattened: (Axis(0), Axis(0)),
    flattened_sequence_first: (Axis(0, minor=True), Axis(0, minor=True)),
    windows: (Axis(0), Axis(0)),
    first_one_then_the_other: (Axis(0), Axis(1)),
}


def data(n: int, length: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, length, WIDTH, dtype=torch.float64), torch.arange(n) % CLASSES


def fit(model: nn.Module, x: Tensor, y: Tensor, structure: str, step: int) -> Curvature:
    """Fitted in batches of `step` examples."""
    options = {"hessian_structure": structure}
    if structure in ("expand", "reduce"):
        options = {"kfac_approx": structure}
    batches = zip(x.split(step), y.split(step), strict=True)
    return Curvature(model.double(), "classification", **options).fit(batches)


def known_layouts(model: nn.Module, x: Tensor) -> tuple[list[object], int]:
    """The layouts that one batch shows, in forward order, and how many of them are settled."""
    network = Network.of(model.double(), resolve("classification"))
    passed = network.record(network.batch(x), Knowledge(network.select("all")))
    known = learn_row_layouts(passed)
    found = [known.row_layouts[passed.key(u)] for u in range(len(passed.recording.uses))]
    return found, len(known.settled)


@pytest.mark.parametrize("n", [7, 8, 33])
@pytest.mark.parametrize("wire", LAYOUTS, ids=lambda wire: wire.__name__)
def test_a_batch_shows_the_layout(wire, n):
    found, settled = known_layouts(Layers(wire), data(n)[0])
    assert found == [*LAYOUTS[wire], Axis(0)] and settled == 3


@pytest.mark.slow
@pytest.mark.parametrize("n", [7, 8, 33])
@pytest.mark.parametrize("wire", LAYOUTS, ids=lambda wire: wire.__name__)
def test_large_batches_give_the_blocks_of_single_examples(wire, n):
    """Single examples cannot go wrong."""
    model, (x, y) = Layers(wire), data(n)
    for structure in STRUCTURES:
        got = dense_blocks(fit(model, x, y, structure, n))
        for step in (1, 6):
            want = dense_blocks(fit(model, x, y, structure, step))
            assert_same_blocks(got, want, EXACT)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("wire", [sequence_first, flattened_sequence_first, flattened])
def test_lengths_that_the_number_of_examples_divides(wire, length):
    """As many tokens as examples asked, or as there are: their axes look alike."""
    model, (x, y) = Layers(wire), data(7, length)
    for structure in STRUCTURES:
        got, want = (dense_blocks(fit(model, x, y, structure, step)) for step in (7, 5))
        assert_same_blocks(got, want, EXACT)


def test_a_model_of_one_batch_size():
    def strict(m: Layers, x: Tensor) -> Tensor:
        assert len(x) == 8
        return sequence_first(m, x)

    model, free, (x, y) = Layers(strict), Layers(sequence_first), data(8)
    free.load_state_dict(model.state_dict())
    for structure in STRUCTURES:
        got, want = (dense_blocks(fit(m, x, y, structure, 8)) for m in (model, free))
        assert_same_blocks(got, want, EXACT)


def gated(m: Layers, x: Tensor) -> Tensor:
    """Layer b counts only where an example's first entry is positive."""
    h = m.a(x.transpose(0, 1)).tanh()
    gate = (x[:, 0, :1] > 0).to(x)
    return (h + gate * m.b(h).tanh()).mean(0)


def masked(m: Layers, x: Tensor) -> Tensor:
    """Layer b sees only the examples whose first entry is positive."""
    h, chosen = m.a(x.mean(1)).tanh(), x[:, 0, 0] > 0
    if bool(chosen.any()):
        h = h.index_put((chosen.nonzero()[:, 0],), m.b(h[chosen]).tanh())
    return h


def left_to_few(x: Tensor, n: int) -> Tensor:
    """Examples that the first, middle and last do not resemble: their first entry is positive."""
    x = x.clone()
    x[:, 0, 0] = x[:, 0, 0].abs()
    x[[0, n // 2, n - 1], 0, 0] *= -1
    return x


@pytest.mark.parametrize("n", [7, 8, 33])
def test_a_layer_that_few_examples_do_not_reach_is_asked_of_all(n):
    model, (x, y) = Layers(gated), data(n, 5)
    x = left_to_few(x, n)
    assert known_layouts(model, x)[0] == [Axis(1), Axis(1), Axis(0)]
    for structure in STRUCTURES:
        got, want = (dense_blocks(fit(model, x, y, structure, step)) for step in (n, 6))
        assert_same_blocks(got, want, EXACT)


def test_examples_that_the_data_choose_are_not_asked_for_the_others():
    """Rows picked in a batch are no whole axis: the exact blocks do without their layout."""
    model, (x, y) = Layers(masked), data(9)
    x = left_to_few(x, 9)
    got, want = (fit(model, x, y, "full", step).blocks["full"].dense() for step in (9, 1))
    assert relative_error(got, want) < EXACT
    assert fit(model, x, y, "diag", 9).coverage["b.weight"] == "diag"
    assert known_layouts(model, x)[0][1] is None


def sorted_by_size(m: Layers, x: Tensor) -> Tensor:
    """Examples in the order of their first entries, by plain integers that no call shows."""
    order = sorted(range(len(x)), key=lambda i: float(x[i, 0, 0]))
    return m.a(x.mean(1)[order]).tanh()[[order.index(i) for i in range(len(x))]]


def chosen_tokens(m: Layers, x: Tensor) -> Tensor:
    """Tokens whose first entry is positive, of all examples, by plain integers."""
    h = x.flatten(0, 1)
    chosen = [i for i, first in enumerate(h[:, 0].tolist()) if first > 0]
    h = h.index_add(0, torch.tensor(chosen, dtype=torch.long), m.a(h[chosen]).tanh())
    return h.unflatten(0, (len(x), -1)).mean(1)


def in_order_but_for_two(x: Tensor) -> Tensor:
    """First entries ascend, also those of the examples asked, except for two neighbours."""
    first = torch.arange(8.0)
    first[[1, 2]] = first[[2, 1]]
    x[:, 0, 0] = first
    return x


def as_many_as_would_fit(x: Tensor) -> Tensor:
    """All tokens of the examples asked are chosen, and 16 of all: two for each of eight."""
    x[..., 0] = -x[..., 0].abs()
    x[[0, 4, 7], :, 0] *= -1
    x[[1, 2, 3], :2, 0] *= -1
    x[5, 0, 0] *= -1
    return x


@pytest.mark.parametrize(
    ("wire", "arrange"),
    [(sorted_by_size, in_order_but_for_two), (chosen_tokens, as_many_as_would_fit)],
)
def test_examples_in_an_order_of_their_own_do_not_pass_for_batch_first(wire, arrange):
    """Some of the examples lie as they came; all eight do not. Exact blocks, or an error."""
    model, (x, y) = Layers(wire), data(8, 3)
    x = arrange(x)
    want = fit(model, x, y, "full", 1).blocks["full"].dense()
    try:
        got = fit(model, x, y, "full", 8).blocks["full"].dense()
    except UnsupportedUse:
        return
    assert relative_error(got, want) < EXACT


def test_repeated_batches_of_other_sizes_use_the_same_layout():
    model, (x, y) = Layers(flattened_sequence_first), data(40)
    for structure in STRUCTURES:
        want = dense_blocks(fit(model, x, y, structure, 5))
        for step in (40, 11, 9):
            assert_same_blocks(dense_blocks(fit(model, x, y, structure, step)), want, EXACT)


def rooted(m: Layers, x: Tensor) -> Tensor:
    """Without a derivative for examples that are zero."""
    return m.b(x.mean(1)).tanh() * m.a(x).square().sum((1, 2)).sqrt()[:, None]


def test_a_batch_that_was_refused_teaches_no_layout():
    model, (x, y) = Layers(rooted).double(), data(8)
    nn.init.zeros_(model.a.bias)
    broken = x.clone()
    broken[0] = 0
    curvature = Curvature(model, "classification")
    with pytest.raises(InvalidValue, match="non-finite curvature"):
        curvature.accumulate(broken, y)
    curvature.accumulate(x, y)
    want = fit(model, x, y, "reduce", 8)
    assert curvature.coverage == want.coverage
    assert_same_blocks(dense_blocks(curvature), dense_blocks(want), EXACT)
