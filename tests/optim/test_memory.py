"""The count of what is kept against the tensors that are."""

import pytest
import torch
from optim.problems import SHAPES, Run, factors_of, gradients_of
from torch import nn

from kfac_laplace.optim import KFAC, Estimate
from kfac_laplace.optim.memory import numbers_of_state
from kfac_laplace.optim.rules import AdamW, Damped, EigenAdam, KLClip


@pytest.mark.parametrize("largest", [4096, 95, 3])
@pytest.mark.parametrize("rule", [EigenAdam(), Damped(), Damped(length=KLClip())], ids=str)
def test_the_numbers_are_those_of_the_tensors(rule, largest):
    for name, shape in SHAPES.items():
        run = Run(rule, {name: shape}, largest=largest)
        factors = factors_of({name: shape})
        run.step(gradients_of({name: shape}), factors)
        moments = [one for one in run.states[name].values() if isinstance(one, torch.Tensor)]
        bases = run.table.state_dict()[name].values()
        numbers = numbers_of_state(shape, rule, largest=largest, packed=False)
        assert numbers.parameters == run.weights[name].numel()
        assert numbers.moments == sum(one.numel() for one in moments)
        assert numbers.bases == sum(one.numel() for one in bases)
        left, right = factors[name]
        kept = [left, right if 1 < right.shape[-1] <= largest else right[..., 0]]
        assert numbers.factors == sum(one.numel() for one in kept)


def test_numbers_of_a_layer():
    """2 moments, bases 64² + 64 + 65² + 65 and factors 64·65/2 + 65·66/2 for 64·65 entries."""
    numbers = numbers_of_state((1, 64, 65), EigenAdam(), largest=4096)
    assert (numbers.moments, numbers.bases, numbers.factors) == (8320, 8450, 4225)
    assert numbers.per_parameter == pytest.approx(20995 / 4160)
    both = numbers + numbers_of_state((1, 10, 1), AdamW(), largest=4096)
    assert (both.parameters, both.moments) == (4170, 8340)


def tensors_in(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [one for inner in found.values() for one in tensors_in(inner)] if found else []


@pytest.mark.parametrize("largest", [4096, 6, 3])
@pytest.mark.parametrize("rule", [EigenAdam(), Damped(length=None)], ids=str)
def test_an_optimiser_counts_what_its_state_holds(rule, largest):
    """Of layers, an embedding and a norm; a frozen layer is none of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)
    )
    model[3].requires_grad_(False)
    optimizer = KFAC(model, rule=rule, curvature=Estimate(largest=largest))
    assert optimizer.numbers_of_state().factors == 0
    x = torch.randint(0, 9, (6, 3))
    nn.functional.cross_entropy(model(x).mT, torch.randint(0, 5, (6, 3))).backward()
    optimizer.step()
    state, numbers = optimizer.state_dict(), optimizer.numbers_of_state()
    sums = [entry["sums"] for entry in state["kfac"]["averages"].values()]
    kept = [one for entry in state["state"].values() for one in entry.values()]
    moments = [one for one in kept if isinstance(one, torch.Tensor)]
    assert numbers.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers.moments == sum(one.numel() for one in moments)
    assert numbers.bases == sum(one.numel() for one in tensors_in(state["kfac"]["bases"]))
    counts = sum(entry["input_count"].numel() for entry in sums)
    assert numbers.factors == sum(t.numel() for e in sums for t in tensors_in(e)) - counts
