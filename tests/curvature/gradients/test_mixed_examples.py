"""Parameters without a layer rule: examples that see each other in the batch are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case
from laws import EXACT, assert_diagonal_blocks, fitted, relative_error, seeded_case
from torch import Tensor, nn

from kfac_laplace import Curvature
from kfac_laplace.curvature.gradients.example_copies import ExampleGraph
from kfac_laplace.curvature.model.batches import Batch
from kfac_laplace.errors import UnsupportedUse

REFUSAL = "an example alone gives another output than in its batch"
#: Half the digits of float64: what examples may differ by, relative to outputs of at least one.
TOLERANCE = torch.finfo(torch.float64).eps ** 0.5

structures = pytest.mark.parametrize("structure", ["kron", "diag", "full"])
#: Models that read numbers out of tensors, and models that do not.
ways = pytest.mark.parametrize("reads", [False, True], ids=["plain", "reads-numbers"])

Mix = Callable[[Tensor, Tensor], Tensor]
#: What each example sees of the others, of inputs (n, i) and outputs (n, c).
MIXING: dict[str, Mix] = {
    "mean": lambda x, f: f.mean(0),
    "detached-mean": lambda x, f: f.mean(0).detach(),
    "mean-input": lambda x, f: x.mean(0)[:2],
    "largest-input": lambda x, f: x.amax(),
    "neighbour": lambda x, f: f.roll(1, 0).detach(),
}


class Distances(nn.Module):
    """Distances to centres, for which there is no layer rule, less what `mix` takes elsewhere."""

    def __init__(self, mix: Mix, share: float, reads: bool):
        super().__init__()
        self.centres, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)
        self.mix, self.share, self.reads = mix, share, reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            float(x.sum())
        f = self.head(torch.cdist(x, self.centres))
        return f - self.share * self.mix(x, f)


def distances(mix: Mix, share: float, reads: bool) -> Case:
    """Regression on all examples in one batch."""
    example = seeded_case(lambda: Distances(mix, share, reads), likelihood="regression")
    return Case(example.model, example.likelihood, [(example.x, example.y)])


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a batch and, one after another, of its examples alone."""
    with torch.no_grad():
        return model(x), torch.cat([model(x[k : k + 1]) for k in range(len(x))])


@ways
@structures
@pytest.mark.parametrize("name", MIXING)
def test_examples_that_see_each_other_are_refused(name, structure, reads):
    """With the largest difference of an output, and nothing is added."""
    example = distances(MIXING[name], 1.0, reads)
    together, alone = outputs(example.model, example.x)
    largest = float((together - alone).abs().max())
    assert largest > 0.1
    curvature = Curvature(example.model, "regression", hessian_structure=structure)
    with pytest.raises(UnsupportedUse, match=REFUSAL) as caught:
        curvature.fit(example.batches)
    assert f"difference of {largest:.2e}" in str(caught.value)
    assert not curvature.blocks and curvature.n_data == 0


@ways
@pytest.mark.parametrize("scale", [0.01, 1000.0])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_half_the_digits_must_agree(share, scale, reads):
    """Differences of half and of twice √ε, relative to the largest output or to one."""
    example = distances(MIXING["detached-mean"], 0.0, reads)
    with torch.no_grad():
        for parameter in example.model.head.parameters():
            parameter.mul_(scale)
    f, _ = outputs(example.model, example.x)
    largest = max(float(f.abs().max()), 1.0)
    assert (largest > 1) == (scale > 1)
    model = example.model
    model.share = 1.0
    together, alone = outputs(model, example.x)
    model.share = share * TOLERANCE * largest / float((together - alone).abs().max())
    if share > 1:
        with pytest.raises(UnsupportedUse, match=REFUSAL):
            fitted(example)
        return
    got = fitted(example).blocks["centres"].dense()
    model.share = 0.0
    unmixed = fitted(example)
    assert_diagonal_blocks(example, unmixed, ["centres"])
    # Each gradient is off by the share that is left, about √ε, and the block by twice that.
    assert relative_error(got, unmixed.blocks["centres"].dense()) < 10 * TOLERANCE


class Similarities(nn.Module):
    """Each example against all of its batch, as in contrastive learning: (n, i) -> (n, n)."""

    def __init__(self, reads: bool):
        super().__init__()
        self.centres, self.reads = nn.Parameter(torch.randn(4, 3)), reads

    def forward(self, x: Tensor) -> Tensor:
        if self.reads:
            float(x.sum())
        h = torch.cdist(x, self.centres)
        return h @ h.detach().mT


@ways
@structures
def test_outputs_of_another_shape_are_refused(structure, reads):
    """Alone, an example has one similarity where it has as many as the batch has examples."""
    model = Similarities(reads).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 4).double()
    with pytest.raises(UnsupportedUse, match=f"{REFUSAL}.*difference of inf"):
        Curvature(model, "regression", hessian_structure=structure).fit([(x, y)])


@ways
def test_a_graph_of_examples_alone_checks_what_it_is_given(reads):
    """Itself passes; one output that is off by more than √ε, or one that is missing, does not."""
    model = distances(MIXING["mean"], 0.0, reads).model
    x, eps = torch.randn(5, 3).double(), torch.finfo(torch.float64).eps
    sizes = []

    def forward(chosen, inputs):
        sizes.append(len(inputs))
        replaced = {**dict(model.named_parameters()), **chosen}
        return torch.func.functional_call(model, replaced, (inputs,))[:, None]  # (n, t, c)

    centres = {"centres": model.centres}
    graph = ExampleGraph(forward, centres, Batch(x, torch.device("cpu")))
    assert sizes == [1] * 5
    want, _ = outputs(model, x)
    assert relative_error(graph.outputs.detach(), want[:, None]) < EXACT
    graph.check(want[:, None], eps)
    size = max(float(want.abs().max()), 1.0)
    for share in (0.5, -0.5):
        near = want[:, None].clone()
        near[3, 0, 1] += share * TOLERANCE * size
        graph.check(near, eps)
    for share in (2.0, -2.0):
        far = want[:, None].clone()
        far[3, 0, 1] += share * TOLERANCE * size
        with pytest.raises(UnsupportedUse, match=REFUSAL):
            graph.check(far, eps)
    for other in (want[:4, None], want[:, None, :1], want[:, None].expand(-1, 2, -1)):
        with pytest.raises(UnsupportedUse, match="difference of inf"):
            graph.check(other, eps)
