"""The benchmark of optimisers: settings, data, networks and methods."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

import torch
from experiments.tiny_tasks import TINY, tiny
from torch import nn

from benchmarks.experiments.optimizers import graphs, text
from benchmarks.experiments.optimizers.methods import METHODS, groups_of
from benchmarks.experiments.optimizers.ranges import Choice, Decay, Even, Logarithmic, drawn, middle
from benchmarks.experiments.optimizers.soap import GradientBases
from benchmarks.experiments.optimizers.steps import numbers_kept
from benchmarks.experiments.optimizers.task import Rows, Size, batches, evaluated, mean_loss
from benchmarks.experiments.optimizers.tasks import TASKS
from benchmarks.experiments.optimizers.training import rate
from benchmarks.experiments.optimizers.transformer import LanguageModel, VisionTransformer

# --- settings ------------------------------------------------------------------------------------


def test_a_latin_hypercube_has_every_part_of_every_range_once():
    ranges = {"a": Even(0.0, 7.0), "b": Logarithmic(1.0, 2.0**7), "c": Choice(("x", "y"))}
    settings = drawn(ranges, 7)
    assert sorted(int(one["a"]) for one in settings) == list(range(7))
    assert sorted(int(math.log2(one["b"])) for one in settings) == list(range(7))
    assert {one["c"] for one in settings} == {"x", "y"}
    assert drawn(ranges, 7) == settings != drawn(ranges, 8)[:7]


def test_methods_of_the_same_ranges_try_the_same():
    assert drawn(METHODS["adamw"].ranges, 5) == drawn(METHODS["expand"].ranges, 5)


def test_middles_of_ranges():
    found = middle({"a": Even(1, 2), "b": Logarithmic(0.01, 1), "c": Decay(0.001, 0.1)})
    assert found == {"a": 1.5, "b": pytest.approx(0.1), "c": pytest.approx(0.99)}


def test_the_rate_rises_evenly_and_falls_to_nothing():
    """Ten steps of which two and a half rise: 1/3.5, 2/3.5, 3/3.5, then down from step 2.5."""
    rates = [rate(step, 10, 0.25, "linear") for step in range(11)]
    falling = [1 - (step - 2.5) / 7.5 for step in range(3, 11)]
    assert rates == pytest.approx([1 / 3.5, 2 / 3.5, 3 / 3.5, *falling])
    assert rate(10, 10, 0.25, "cosine") == pytest.approx(0)
    assert rate(6, 10, 0.2, "cosine") == pytest.approx(0.5)  # half of the way down


# --- data and networks ---------------------------------------------------------------------------


def test_picked_graphs_are_those_of_the_tables():
    found = graphs.data(tiny("graphs"), "cpu").train
    graph, y = found.pick(torch.tensor([3, 0, 3]))
    first_node = found.sizes.cumsum(0) - found.sizes
    first_edge = found.lengths.cumsum(0) - found.lengths
    nodes = edges = 0
    for place, k in enumerate([3, 0, 3]):
        size, length = int(found.sizes[k]), int(found.lengths[k])
        whole = slice(int(first_node[k]), int(first_node[k]) + size)
        bonds = slice(int(first_edge[k]), int(first_edge[k]) + length)
        here, there = slice(nodes, nodes + size), slice(edges, edges + length)
        assert torch.equal(graph["x"][here].argmax(1), found.nodes[whole])
        assert torch.equal(
            graph["edge_index"][:, there] - nodes, found.edges[:, bonds] - first_node[k]
        )
        assert torch.equal(graph["edge_attr"][there].argmax(1), found.kinds[bonds])
        assert (graph["batch"][here] == place).all()
        assert y[place] == found.y[k]
        nodes, edges = nodes + size, edges + length
    assert (len(graph["x"]), graph["edge_index"].shape[1]) == (nodes, edges)


def test_graphs_are_like_molecules():
    """Connected, both directions, four neighbours and one ring's more, every class occurs."""
    size = Size(**(TINY.__dict__ | {"train": 60, "side": 15}))
    found = graphs.data(size, "cpu").train
    assert found.sizes.min() >= 8 and found.sizes.max() <= 15
    assert set(found.y.tolist()) == {0, 1, 2, 3}
    # each of two outputs is above its median for half of the graphs
    assert int((found.y >= 2).sum()) == int((found.y % 2).sum()) == 30
    for k in range(60):
        graph, _ = found.pick(torch.tensor([k]))
        n = len(graph["x"])
        near = torch.zeros(n, n)
        near[graph["edge_index"][0], graph["edge_index"][1]] = 1
        assert torch.equal(near, near.T) and near.diagonal().sum() == 0
        assert near.sum() == graph["edge_index"].shape[1] >= 2 * (n - 1)
        assert near.sum(1).max() <= graphs.NEIGHBOURS + 1
        assert ((torch.eye(n) + near).matrix_power(n) > 0).all()


def test_a_graphs_scores_do_not_depend_on_the_others():
    found = graphs.data(tiny("graphs"), "cpu").train
    model = graphs.network(tiny("graphs")).double()
    scores = [
        model({key: t.double() if t.is_floating_point() else t for key, t in graph.items()})
        for graph, _ in (found.pick(torch.tensor(index)) for index in ([0, 1, 2], [1]))
    ]
    assert torch.allclose(scores[0][1], scores[1][0], rtol=0, atol=1e-12)


def test_labels_of_texts_are_the_next_characters():
    parts = text.data(TINY, "cpu")
    for part in parts:
        assert part.x.shape == part.y.shape == (len(part), TINY.side)
        assert torch.equal(part.x[:, 1:], part.y[:, :-1])
        assert 0 <= part.x.min() and part.x.max() < text.TOKENS
    assert [len(part) for part in parts] == [12, 8, 8]


def test_no_paragraph_is_learned_and_tested():
    found = [bytes(part.tolist()).split(b"\n\n") for part in text.corpora()]
    everything = [paragraph for part in found for paragraph in part]
    assert len(everything) == len(set(everything))
    assert min(len(part) for part in found) > 100


def test_a_language_model_does_not_see_what_comes():
    model = LanguageModel(text.TOKENS, 6, 8, 2)
    one = torch.arange(6)[None]
    other = one.clone()
    other[0, 4] = 99
    before, after = model(one), model(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_a_vision_transformer_sees_patches_in_their_places():
    model = VisionTransformer(3, 8, 8, 1)
    x = torch.rand(2, 3, 8, 8)
    assert model(x).shape == (2, 10)
    assert not torch.allclose(model(x), model(x.flip(-1)), atol=1e-4)
    assert VisionTransformer(1, 28, 8, 1).position.shape == (1, 16, 8)


def test_batches_go_through_all_examples_in_new_orders():
    rows = Rows(torch.arange(10), torch.arange(10))
    stream = batches(rows, 3, seed=0)
    passes = [torch.cat([next(stream)[1] for _ in range(3)]).tolist() for _ in range(2)]
    assert all(len(set(one)) == 9 for one in passes) and passes[0] != passes[1]
    again = batches(rows, 3, seed=0)
    assert torch.cat([next(again)[1] for _ in range(3)]).tolist() == passes[0]


def test_evaluation_is_by_position_and_leaves_training_mode():
    """Scores that favour class 1 by log 3: a quarter of the mass lies on class 0."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Dropout(0.9))
    model[0].weight.data = torch.tensor([[0.0], [math.log(3)]])
    labels = torch.tensor([[0, 1], [1, 1]])
    model.train()
    found = evaluated(model, Rows(torch.ones(2, 2, 1), labels))
    assert found["accuracy"] == 0.75
    assert found["nll"] == pytest.approx(-(math.log(0.25) + 3 * math.log(0.75)) / 4, rel=1e-6)
    assert model.training


# --- methods -------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 20, 4, generator=generator, dtype=torch.float64)
    return model, x, torch.randint(3, (6, 20), generator=generator)


def steps(model, optimizer, x, y):
    for inputs, labels in zip(x, y, strict=True):
        optimizer.zero_grad()
        mean_loss(model(inputs), labels).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_bases_of_no_side_are_adamw():
    """In own coordinates the rule is torch's AdamW, bit by bit."""
    common = {"lr": 0.03, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    model, x, y = small()
    found = steps(model, GradientBases(model, model.parameters(), largest=0, **common), x, y)
    model, x, y = small()
    adamw = torch.optim.AdamW(model.parameters(), foreach=False, **common)
    assert torch.equal(found, steps(model, adamw, x, y))


def test_bases_of_gradients_against_their_definition():
    """One matrix without bias, covariances and bases anew in every step, written down densely."""
    lr, decay, (b1, b2), ema = 0.05, 0.1, (0.9, 0.8), 0.7
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 30, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6, 30), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False).double())
    w = model[0].weight.detach().clone()
    found = steps(
        model,
        GradientBases(
            model, model.parameters(), lr=lr, weight_decay=decay, betas=(b1, b2),
            every=1, bases_every=1, ema=ema,
        ),
        x,
        y,
    )  # fmt: skip
    m, v = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    left, right = torch.zeros(3, 3).double(), torch.zeros(4, 4).double()
    q, p = torch.eye(3).double(), torch.eye(4).double()
    for step, (inputs, labels) in enumerate(zip(x, y, strict=True), 1):
        probs = (inputs @ w.T).softmax(-1)
        g = (probs - nn.functional.one_hot(labels, 3)).T @ inputs / len(labels)
        weight = 1.0 if step == 1 else 1 - ema
        left, right = left + weight * (g @ g.T - left), right + weight * (g.T @ g - right)
        before = q, p
        q, p = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
        # the diagonal, in the new basis, of a covariance that was diagonal in the last
        change = torch.kron(q.T @ before[0], p.T @ before[1])
        v = (change @ v.flatten().diag() @ change.T).diag().view(3, 4)
        m = b1 * m + (1 - b1) * g  # in the matrix's own coordinates
        v = b2 * v + (1 - b2) * (q.T @ g @ p) ** 2
        inside = (q.T @ m @ p / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + 1e-8)
        w = (1 - lr * decay) * w - lr * q @ inside @ p.T
    # in null directions of the covariances, whose bases are arbitrary, an update is rounding over
    # epsilon: 1e-16 / 1e-8
    assert torch.allclose(found.view(3, 4), w, rtol=0, atol=1e-8)


@pytest.mark.parametrize("step", [1, 2])
def test_asdl_leaves_gradients_of_norms_alone(step):
    """On a step that estimates curvature it sums the loss and divides: by the right number."""
    if (reason := METHODS["asdl"].lacks()) is not None:
        pytest.skip(reason)
    model, x, y = small()
    model, x = model.float(), x.float()
    stepper = METHODS["asdl"].make(model, middle(METHODS["asdl"].ranges), 0)
    for inputs, labels in zip(x[:step], y[:step], strict=True):
        stepper.optimizer.zero_grad()
        stepper.gradients(inputs, labels)
    norm, head = (layer.weight.grad.clone() for layer in (model[2], model[3]))
    model.zero_grad()
    mean_loss(model(x[step - 1]), y[step - 1]).backward()
    assert torch.allclose(norm, model[2].weight.grad, rtol=1e-4, atol=1e-6)  # float32 sums
    assert not torch.allclose(head, model[3].weight.grad, rtol=1e-2)


def test_scalars_of_fixup_learn_at_a_tenth_of_the_rate():
    model = TASKS["wrn"].network(tiny("wrn"))
    matrices, scalars = groups_of(model, 0.2)
    assert "lr" not in matrices and scalars["lr"] == pytest.approx(0.02)
    assert all(p.shape == (1,) for p in scalars["params"])
    everything = [*matrices["params"], *scalars["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("method", "kept"), [("sgd", 1), ("adamw", 2)])
def test_numbers_kept(method, kept):
    model, x, y = small()
    stepper = METHODS[method].make(model, middle(METHODS[method].ranges), 0)
    stepper(x[0], y[0])
    assert numbers_kept(stepper) == kept * sum(p.numel() for p in model.parameters())


def test_numbers_kept_of_bases():
    """For each matrix two moments, and for each side a factor, a basis and eigenvalues."""
    model, x, y = small()
    stepper = METHODS["soap"].make(model, middle(METHODS["soap"].ranges), 0)
    stepper(x[0], y[0])
    sides = sum(2 * d * d + d for d in (4, 5, 5, 3))
    assert numbers_kept(stepper) == 2 * sum(p.numel() for p in model.parameters()) + sides
