"""The count of what is kept against the tensors that are."""

import pytest
import torch
from optim.problems import SHAPES, Run, factors_of, gradients_of

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
        dense = [one for one in factors[name] if 1 < one.shape[-1] <= largest]
        rest = [one[..., 0] for one in factors[name] if not 1 < one.shape[-1] <= largest]
        assert numbers.factors == sum(one.numel() for one in dense + rest)


def test_numbers_of_a_layer():
    """2 moments, bases 64² + 64 + 65² + 65 and factors 64·65/2 + 65·66/2 for 64·65 entries."""
    numbers = numbers_of_state((1, 64, 65), EigenAdam(), largest=4096)
    assert (numbers.moments, numbers.bases, numbers.factors) == (8320, 8450, 4225)
    assert numbers.per_parameter == pytest.approx(20995 / 4160)
    both = numbers + numbers_of_state((1, 10, 1), AdamW(), largest=4096)
    assert (both.parameters, both.moments) == (4170, 8340)
